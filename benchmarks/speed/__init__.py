"""Merges timed side by side with mergekit: `python -m benchmarks.speed merge --help`."""
