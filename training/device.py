"""The device of a run: which one, how fast it could be, how much memory is used, what it is called."""

from __future__ import annotations

import ctypes
import os
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

# What the driver says that each has, in GiB; of those that come in two sizes the larger.
MEMORY_GIB = {
    "V100": 31.7,
    "T4": 14.6,
    "A10G": 22.0,
    "A100": 79.3,
    "L4": 22.0,
    "L40S": 44.4,
    "RTX 3090": 23.7,
    "RTX 4090": 23.6,
    "H100": 79.2,
    "H100 PCIe": 79.2,
    "H100 NVL": 93.1,
    "H200": 139.8,
    "GH200": 94.5,
    "B200": 178.4,
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def select_device(asked: str) -> torch.device:
    """The device that was asked for, or the first there is. Raises UserError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[asked]:
        raise UserError(f"parallel.device: this machine has no {asked}; use auto or cpu")
    return torch.device(asked)


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device has bf16 matrix units; a CPU without them is several times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "amx_bf16" in _cpu_fields().get("flags", "")


def resolve_precision(asked: str, device: torch.device) -> str:
    """The precision that `auto` means here: bf16 where there are matrix units for it, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if has_bf16_units(device) else "fp32"


def device_name(device: torch.device) -> str:
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


def available_memory_bytes(device: torch.device) -> int:
    """Memory that this process may use: what others leave of a GPU's, or its share of a CPU's among the run's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        physical = min(physical, int(text))
    if os.name == "posix":
        import resource

        asked, _ = resource.getrlimit(resource.RLIMIT_AS)
        physical = physical if asked == resource.RLIM_INFINITY else min(physical, asked)
    return physical // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc, what is freed stays the process's own, all of it, from now on, and is used again.

    Else large tensors are mapped and unmapped at each use, and the kernel clears their pages one by one: up to a third
    of a step. What the process has is its peak so far, or since `reset_peak_memory` (mallopt(3)).
    """
    if (c_library := _glibc(device)) is not None:
        c_library.mallopt(-4, 0)  # M_MMAP_MAX: no tensor is a mapping of its own
        c_library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is handed back


def release_freed_memory(device: torch.device) -> None:
    """The other way again, where memory is scarce: what is free goes back, and so does what will be freed."""
    if (c_library := _glibc(device)) is not None:
        c_library.mallopt(-4, 65536)  # M_MMAP_MAX, as it is at first
        c_library.mallopt(-1, 2**17)  # M_TRIM_THRESHOLD
        c_library.malloc_trim(0)


def _glibc(device: torch.device) -> ctypes.CDLL | None:
    """The C library that tensors there are allocated by, where it is glibc."""
    return ctypes.CDLL(None) if device.type == "cpu" and platform.libc_ver()[0] == "glibc" else None


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for a new peak, where that can be told. Memory that is free goes back, else it would count."""
    if (c_library := _glibc(device)) is not None:
        c_library.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # proc(5): the peak resident set is what it is now


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process had since `reset_peak_memory`, or since it began where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return round(peak_memory_gib(device) * 2**30)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator raised it."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _cpu_fields() -> dict[str, str]:
    """The first processor's fields in Linux's /proc/cpuinfo; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
