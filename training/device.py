"""The device of a run: which one, how fast it could be, how much memory is used, what it is called."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path

import torch

from training.errors import UserError

# Peak dense matrix products per second in bf16 with float32 sums (fp16 where there is no bf16), from
# the makers' data sheets; the longest name that matches counts.
PEAK_FLOPS = {
    "V100": 125e12,
    "T4": 65e12,
    "A10G": 70e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick(asked: str) -> torch.device:
    """The device that was asked for, or the first there is. Raises UserError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[asked]:
        raise UserError(f"parallel.device: this machine has no {asked}; use auto or cpu")
    return torch.device(asked)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix units; a CPU without them is several times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "amx_bf16" in _cpu_fields().get("flags", "")


def resolve_precision(asked: str, device: torch.device) -> str:
    """The precision that `auto` means here: bf16 where there are matrix units for it, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if multiplies_bf16(device) else "fp32"


def describe(device: torch.device) -> str:
    """The device in words: "NVIDIA H200", "CPU, 2 threads (Intel Xeon Processor)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS ({platform.processor() or platform.machine()})"
    name = _cpu_fields().get("model name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} ({name})"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device for 16-bit products, where it is known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(re.split("[ -]", name))
    known = [key for key in PEAK_FLOPS if words.issuperset(key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process had so far: the allocator's on a GPU, the resident set on a CPU; on MPS, what it has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _cpu_fields() -> dict[str, str]:
    """The first processor's fields in Linux's /proc/cpuinfo; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
