"""Kernels for attention, experts and the loss, each with a readable reference, and the choice between them.

| file | contents |
|---|---|
| `interface.py` | requirements of a model (`...Spec`), kernel signatures, and `Kernels`, which a model computes with |
| `attention/` | the attention back-ends; `attention/table.py` lists them with their limits |
| `experts.py`, `triton_experts.py` | the grouped matmuls of a Mixture-of-Experts layer |
| `loss.py`, `triton_loss.py` | the cross-entropy of the output projection |
| `table.py` | all three tables: every kernel by its name in `parallel.attention`, `.experts` and `.loss` |
| `trials.py` | small problems on which a kernel is compared with its reference |
| `choose.py` | `choose_kernels`: which kernels a run uses, and why |
"""
