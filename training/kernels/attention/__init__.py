"""Attention back-ends (a file for each library), their masks, and `table.py`, which lists them."""
