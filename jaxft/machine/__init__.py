"""The machine a process runs on: platforms, memory, threads, kinds of chips, and the other processes of a run."""
