"""Many runs of one kind, compared: a space of settings, the runs in it, a ledger of them, and their ranking."""
