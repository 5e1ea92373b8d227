"""Comparisons of runs with the same seeds: `python -m training.compare`."""
