"""Estimates of a run's memory, time and disk space, computed before it starts."""
