"""Where the numbers of a run go: logs, trackers, tables and pictures."""
