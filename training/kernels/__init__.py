"""Kernels for attention, experts and the loss, each with a readable reference, and the choice between them.

`interface.py` has the requirements of a model and the signatures of kernels. `table.py` lists all kernels by name.
`choose.py` picks one of each table: it must match the reference in the small problems of `trials.py`.
"""
