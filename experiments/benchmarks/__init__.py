"""Benchmarks: `python -m experiments.benchmarks.NAME [--json]`."""
