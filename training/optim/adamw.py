"""AdamW (arXiv:1711.05101): PyTorch's fused implementation."""

from typing import Self

import torch

from training.config import AdamWConfig
from training.optim.parameters import NamedParameter, ParameterKind


class AdamW(torch.optim.AdamW):
    """AdamW with weight decay on matrices and routers only, and a separate learning rate for embeddings."""

    state_names = ("exp_avg", "exp_avg_sq")  # tensors of the parameter's shape
    scalar_state_names = ("step",)

    @classmethod
    def build(cls, config: AdamWConfig, parameters: list[NamedParameter], **_: object) -> Self:
        """Build the optimizer of `parameters`."""

        def group(kinds: tuple[ParameterKind, ...], lr: float, weight_decay: float) -> dict:
            members = [p for _, p, kind in parameters if kind in kinds]
            return {"params": members, "lr": lr, "weight_decay": weight_decay}

        groups = [
            group(("matrix", "router"), config.learning_rate, config.weight_decay),
            group(("embedding",), config.embedding_learning_rate or config.learning_rate, 0.0),
            group(("vector",), config.learning_rate, 0.0),
        ]
        return cls(
            [group for group in groups if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
