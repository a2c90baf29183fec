"""Folders as people have them, each judged against the reference: see run.py."""
