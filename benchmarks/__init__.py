"""Benchmarks: one command each, `python -m benchmarks.NAME`, against a baseline in the same run."""
