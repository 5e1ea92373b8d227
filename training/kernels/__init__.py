"""Kernels for attention, experts and the loss, each with a readable reference, and the choice between them.

| file | contents |
|---|---|
| `interface.py` | what a model asks of its kernels (`...Spec`), the signatures, and `Kernels`, which it gets |
| `attention/` | the attention back-ends; `attention/table.py` lists them with their limits |
| `experts.py`, `triton_experts.py` | the matrix products of a Mixture-of-Experts layer |
| `loss.py`, `triton_loss.py` | the cross-entropy of the output projection |
| `table.py` | all three tables: every kernel by its name in `parallel.attention`, `.experts` and `.loss` |
| `trials.py` | small problems on which a kernel is compared with its reference |
| `choose.py` | `choose_kernels`: which kernels a run uses, and why |
"""
