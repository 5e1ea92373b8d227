"""Dynamic loss scaling for fp16."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor of an fp16 loss (arXiv:1710.03740): halved on overflow, doubled after 2000 good steps."""

    scale: float
    good_steps: int  # since the last overflow

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step; `finite`: loss and gradient have no NaN or Inf."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % 2000 == 0:
            self.scale *= 2
