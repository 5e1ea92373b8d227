"""torch.compile's errors as one line: no restart mends a missing compiler."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from training.errors import UserError, library_error
from training.terminal import print_note

REMEDY = "or set parallel.compile: false"


class Compilable(Protocol):
    """A model that compiles itself in place."""

    def compile(self) -> None: ...


def check_compiler(device: torch.device, *, is_main: bool) -> None:
    """Raise UserError if something is missing without which torch.compile would fail at the first step.

    The main rank says so if the environment turns torch.compile off.
    """
    if disabled := [name for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE") if os.environ.get(name) == "1"]:
        if is_main:
            print_note(f"parallel.compile: {disabled[0]} in the environment turns it off")
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # makes the folder of the cache
        from torch._inductor.runtime.runtime_utils import cache_dir

        if device.type == "cpu":
            get_cpp_compiler()
        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}; set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        raise UserError(f"parallel.compile: {problem}, {REMEDY}") from error
    except RuntimeError as error:
        problem = f"{library_error(error)}; install g++ or clang, or set CXX to one"
        raise UserError(f"parallel.compile: {problem}, {REMEDY}") from error
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise UserError(f"parallel.compile: Triton does not work on this GPU; install PyTorch's triton, {REMEDY}")


@contextmanager
def compiled(model: Compilable) -> Iterator[None]:
    """Compile the model, and turn the compiler's errors, which come with its first calls, into UserErrors."""
    model.compile()
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error.__cause__ or error
        lines = str(cause).splitlines()
        reason = next((line.strip() for line in lines if "error:" in line), library_error(cause))
        raise UserError(f"parallel.compile: the model does not compile here: {reason}; mend it, {REMEDY}") from error
    finally:
        torch._dynamo.reset()  # compiled code has a limit, which the next run of this process would reach
