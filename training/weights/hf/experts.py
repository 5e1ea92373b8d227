"""Layers of experts in the architectures of Transformers: their indices and their tensors."""

from training.config import BlockConfig, MLPConfig, MoEConfig
from training.weights.hf.llama import MATRICES, PerLayer, Tensors, weights
from training.weights.hf.names import Name

EXPERT_KINDS = (MLPConfig, MoEConfig)
EVERY_LAYER = PerLayer(lambda _layers: {}, lambda _hf, n_layer: [True] * n_layer)


def dense_layers(layers: list[BlockConfig]) -> list[int]:
    """Return the indices of the layers without experts."""
    return [i for i, block in enumerate(layers) if isinstance(block.ffn, MLPConfig)]


def expert_tensors(
    module: str = "mlp",
    matrices: dict[str, str] = MATRICES,
    *,
    bias: str | None = None,
    bias_index: tuple[None, ...] = (),
    always_shared: bool = False,
) -> Tensors:
    """Return the table of a layer of experts: router, experts, selection bias and shared experts.

    `bias` is their name of the selection bias, (1, E) with bias_index=(None,). With `always_shared` a layer without
    shared experts has shared matrices of width 0.
    """

    def tensors(ffn: MoEConfig, theirs: str, ours: str) -> list[Name]:
        theirs, ours = f"{theirs}.{module}", f"{ours}.ffn"
        names = [Name(f"{theirs}.gate.weight", (f"{ours}.router.weight",))]
        names += [
            Name(f"{theirs}.experts.{e}.{a}.weight", (f"{ours}.experts.{b}",), index=(e,))
            for e in range(ffn.n_experts)
            for a, b in matrices.items()
        ]
        if bias is not None:
            names.append(Name(f"{theirs}.{bias}", (f"{ours}.selection_bias",), index=bias_index))
        if ffn.n_shared:
            names += weights(f"{theirs}.shared_experts", f"{ours}.shared", MATRICES)
        elif always_shared:
            empty = {"up": (0, slice(0)), "gate": (0, slice(0)), "down": (0, slice(None), slice(0))}
            names += [
                Name(f"{theirs}.shared_experts.{a}.weight", (f"{ours}.experts.{b}",), index=empty[b])
                for a, b in MATRICES.items()
            ]
        return names

    return tensors
