"""The device of a run: selection, name, peak FLOP/s and memory."""

import ctypes
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from training.errors import UserError


class GPU(NamedTuple):
    """Figures of a GPU model."""

    memory_gib: float  # as the driver reports it; the larger size if it is sold in two
    peak_flops: float  # data sheet: dense bf16 (without bf16: fp16) matmuls, float32 accumulation


GPUS = {
    "V100": GPU(31.7, 125e12),
    "T4": GPU(14.6, 65e12),
    "A10G": GPU(22.0, 70e12),
    "A100": GPU(79.3, 312e12),
    "L4": GPU(22.0, 121e12),
    "L40S": GPU(44.4, 362e12),
    "RTX 3090": GPU(23.7, 71e12),
    "RTX 4090": GPU(23.6, 165e12),
    "H100": GPU(79.2, 989e12),
    "H100 PCIe": GPU(79.2, 756e12),
    "H100 NVL": GPU(93.1, 835e12),
    "H200": GPU(139.8, 989e12),
    "GH200": GPU(94.5, 989e12),
    "B200": GPU(178.4, 2250e12),
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def select_device(name: str) -> torch.device:
    """Return the device of that type; "auto": the first of cuda, mps, cpu. Raises UserError if there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, is_available in available.items() if is_available))
    if not available[name]:
        raise UserError(f"parallel.device: this machine has no {name}; use auto or cpu")
    return torch.device(name)


def has_bf16_units(device: torch.device) -> bool:
    """Return True if the device has bf16 matrix units; without them a CPU is several times slower in bf16 than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "amx_bf16" in _cpu_field("flags")


def resolve_precision(precision: str, device: torch.device) -> str:
    """Replace "auto" by bf16 if the device has matrix units for it, else by fp32."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16_units(device) else "fp32"


def device_name(device: torch.device) -> str:
    """Return the name of the device: "NVIDIA H200", "CPU, 2 threads (Intel Xeon Processor)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS ({platform.processor() or platform.machine()})"
    name = _cpu_field("model name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} ({name})"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of 16-bit matmuls; None if unknown."""
    if device.type != "cuda" or precision == "fp32":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))
    known = [name for name in GPUS if words.issuperset(name.split())]
    return GPUS[max(known, key=len)].peak_flops if known else None


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: allocated on CUDA, resident on a CPU; on MPS the current memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_memory_bytes(device: torch.device) -> int:
    """Return the memory that this process may use: the GPU's that is free, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cgroup_limit = Path("/sys/fs/cgroup/memory.max")
    if cgroup_limit.exists() and (text := cgroup_limit.read_text().strip()).isdigit():
        n_bytes = min(n_bytes, int(text))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        n_bytes = min(n_bytes, address_space)
    return n_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that this process can still allocate, about."""
    if device.type == "cuda":
        return available_memory_bytes(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return available_memory_bytes(device) - torch.mps.current_allocated_memory()
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    return available_memory_bytes(device) - resident


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep freed memory for reuse, so that resident memory stays at its peak until `reset_peak_memory`.

    By default glibc unmaps large tensors, and the kernel zeroes the pages of the next ones: up to a third of a step.
    """
    if (c_library := _glibc(device)) is not None:
        c_library.mallopt(-4, 0)  # M_MMAP_MAX: allocate every tensor on the heap
        c_library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def release_freed_memory(device: torch.device) -> None:
    """Return freed memory to the system, now and from now on: for recomputation, and when memory is scarce.

    Tensors from 1 MiB have mappings of their own. On glibc's heap, small pieces that stay in use between them keep
    freed memory from being reused: with `recompute: full` a run took twice its tensors' memory (docs/planning.md).
    """
    if (c_library := _glibc(device)) is not None:
        c_library.mallopt(-4, 65536)  # M_MMAP_MAX: its default
        c_library.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: else glibc raises it to the size of each mapping that is freed
        c_library.mallopt(-1, 2**17)  # M_TRIM_THRESHOLD
        c_library.malloc_trim(0)


def _glibc(device: torch.device) -> ctypes.CDLL | None:
    """Return the C library if it is glibc and allocates the tensors of this device."""
    return ctypes.CDLL(None) if device.type == "cpu" and platform.libc_ver()[0] == "glibc" else None


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak-memory counter, after returning free heap pages to the system: they would be counted."""
    if (c_library := _glibc(device)) is not None:
        c_library.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # proc(5): reset the peak resident set to the current one


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`: reserved on CUDA, resident on Linux; else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return round(peak_memory_gib(device) * 2**30)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if an allocator raised the error."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _cpu_field(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; "" if there is none."""
    path = Path("/proc/cpuinfo")
    match = re.search(rf"^{name}\s*: (.*)", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1].strip() if match else ""
