"""Run files, benchmarks and the log of results."""
