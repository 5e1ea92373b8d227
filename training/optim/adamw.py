"""AdamW (arXiv:1711.05101): PyTorch's fused implementation."""

import torch

from training.config import AdamWConfig
from training.optim.parameters import ParametersByKind


class AdamW(torch.optim.AdamW):
    """AdamW with weight decay on matrices and routers only, and a separate learning rate for embeddings."""

    state_names = ("exp_avg", "exp_avg_sq")
    scalar_state_names = ("step",)

    def __init__(self, config: AdamWConfig, parameters: ParametersByKind, **_: object):
        embedding_lr = config.embedding_learning_rate or config.learning_rate
        groups = [
            {"params": parameters["matrix"] + parameters["router"]},
            {"params": parameters["embedding"], "weight_decay": 0.0, "lr": embedding_lr},
            {"params": parameters["vector"], "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        super().__init__(groups, config.learning_rate, betas, config.eps, config.weight_decay, fused=True)
