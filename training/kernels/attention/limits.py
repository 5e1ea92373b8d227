"""What an attention back-end cannot do, known without running it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

HALF_DTYPES = (torch.bfloat16, torch.float16)


class Limits(NamedTuple):
    """What a back-end can do on one type of device. The defaults are everything."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF_DTYPES)
    head_dim: int | None = None  # the largest
    head_dim_multiple: int = 1
    window: bool = True
    softcap: bool = True
    documents: bool = True
    capability: range | None = None  # major numbers of CUDA's compute capability; None: any
    package: tuple[str, str] | None = None  # what has to be installed, and the oldest version that will do
    deterministic: bool = True  # two runs get the same gradients, to the bit


def reason_missing(package: str, oldest: str) -> str | None:
    """What is missing here, in words; None where the package is there and not too old."""
    try:
        found = TorchVersion(version(package))
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None if found >= oldest else f"{package} {found} is too old, {oldest} or later is needed"
