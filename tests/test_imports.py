"""Importing or running a part of the package loads no unused module that costs over a second of CPU."""

import json

import pytest
from conftest import command

SLOW = ("torch._dynamo", "torch._inductor", "torch.nn.attention.flex_attention", "torch.distributed.fsdp", "triton")
# Imported in this order by one process. A module that loads a slow one fails, and so does each module after it.
MODULES = (
    "training.kernels.choose",
    "training.model",
    "training.batch",
    "training.distributed.world",
    "training.distributed.parallelize",
    "training.evaluate",
    "training.generate",
    "training.export",
    "training.engine",
)

PROGRAM = f"""if True:
    import importlib, json, sys
    loaded = {{}}
    for name in {MODULES}:
        importlib.import_module(name)
        loaded[name] = [slow for slow in {SLOW} if slow in sys.modules]
    print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def slow_modules() -> dict[str, list[str]]:
    """Return the slow modules that are loaded after importing each module."""
    done = command("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODULES)
def test_importing_it_loads_no_slow_module(name, slow_modules):
    assert slow_modules[name] == []


def test_generation_and_evaluation_of_a_dense_model_load_no_slow_module(finished):
    folder = finished()
    program = f"""if True:
        import sys
        from training import evaluate, generate
        assert generate.main(["--run", {str(folder)!r}, "--prompt", "import", "--tokens", "3", "--device", "cpu"]) == 0
        assert evaluate.main(["--run", {str(folder)!r}, "--device", "cpu"]) == 0
        print([slow for slow in {SLOW} if slow in sys.modules])
    """
    done = command("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
