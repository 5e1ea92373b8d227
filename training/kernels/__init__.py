"""Attention, expert and loss kernels, each with a reference, and the code that chooses between them."""
