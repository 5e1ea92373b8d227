"""Attention back-ends, their masks and their limits."""
