"""Micro-benchmarks that anyone can run: contenders in processes of their own, medians with spread, tables, CSV, JSON, plots."""
