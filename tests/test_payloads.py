"""Files that try to run code: nothing runs, and the user gets a one-line error."""

import ast
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_config

from training import device as devices
from training.checkpoint import corruption
from training.data import prepare
from training.errors import UserError
from training.options import cli
from training.train import train

CPU = torch.device("cpu")
FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn")
watched: list[str] | None = None


def watch(event: str, _arguments: tuple) -> None:
    if watched is not None and event in FORBIDDEN:
        watched.append(event)


sys.addaudithook(watch)


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def payload(tmp_path):
    """A pickle that would create a file. After the test the file must not exist, and nothing may have run."""
    global watched
    canary, watched = tmp_path / "canary", []
    yield pickle.dumps(Payload(canary))
    events, watched = watched, None
    assert not canary.exists() and events == []


@contextmanager
def quick_and_small():
    """Check that at most 2 s of CPU time and 256 MiB are used."""
    devices.reset_peak_memory(CPU)
    before, began = devices.peak_memory_bytes(CPU), time.process_time()
    yield
    assert time.process_time() - began < 2
    assert devices.peak_memory_bytes(CPU) - before < 2**28


def assert_user_error(work, *words: str) -> None:
    with quick_and_small(), pytest.raises(UserError) as error:
        work()
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint, and its hash in the manifest, as an attacker would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


HUGE = (2**60).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "header of 2^60", "header that is no JSON", "empty"])
def test_a_checkpoint_file_that_is_not_safetensors_is_an_error_though_the_manifest_fits(
    run, config, payload, name, kind
):
    folder = run() / "checkpoints/step-00000006"
    shutil.rmtree(folder.with_name("step-00000008"))
    data = {"pickle": payload, "header of 2^60": HUGE, "empty": b""}.get(kind, b"\x08" + bytes(7) + b"notjson!")
    replace_file(folder, name, data)
    assert corruption(folder) is None
    assert_user_error(lambda: train(config()), str(folder / name))


@pytest.mark.parametrize(
    "text", ["[]", '{"step": 6}', '{"step": "6", "config": {}, "data": ""}', '{"step": 6, "config": 3}']
)
def test_a_checkpoint_with_another_state_is_an_error(run, config, text):
    folder = run() / "checkpoints/step-00000006"
    shutil.rmtree(folder.with_name("step-00000008"))
    replace_file(folder, "state.json", text.encode())
    assert_user_error(lambda: train(config()), "start over with --resume never")


def test_a_link_in_a_checkpoint_is_damage(run, tmp_path):
    folder = run() / "checkpoints/step-00000008"
    shutil.move(folder / "state.json", tmp_path / "elsewhere")
    (folder / "state.json").symlink_to(tmp_path / "elsewhere")
    assert corruption(folder) == f"{folder}/manifest.json: damaged: 'state.json' is no file of this folder"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "txt.gz", "jsonl.zst", "csv"])
@pytest.mark.parametrize("kind", ["pickle", "object array"])
def test_a_data_file_that_is_a_pickle_is_an_error(config, tmp_path, payload, suffix, kind):
    file = tmp_path / f"text.{suffix}"
    file.write_bytes(payload)
    if kind == "object array":
        with file.open("wb") as opened:
            np.save(opened, np.array([Payload(tmp_path / "canary")], dtype=object), allow_pickle=True)
    data = config().data.model_copy(
        update={"sources": (config().data.sources[0].model_copy(update={"paths": (str(file),)}),)}
    )
    assert_user_error(lambda: prepare(data, quiet=True), str(file))


def test_a_tokenizer_that_is_a_pickle_is_an_error(config, tmp_path, payload):
    (tmp_path / "tokenizer.json").write_bytes(payload)
    run_config = config(
        data=config().data.model_dump() | {"tokenizer": {"type": "file", "path": str(tmp_path / "tokenizer.json")}}
    )
    assert_user_error(lambda: prepare(run_config.data, quiet=True), "tokenizer.json")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "name: !!python/object/new:os.system ['touch CANARY']",
        "name: $(touch CANARY)",
        'name: \'{__import__("os").system("touch CANARY")}\'',
        "name: `touch CANARY`",
        "name: ../../CANARY",
    ],
)
def test_code_in_a_configuration_never_runs(tmp_path, payload, text):  # noqa: ARG001 (the canary)
    path = tmp_path / "a.yaml"
    path.write_text(text.replace("CANARY", str(tmp_path / "canary")) + "\n")
    with quick_and_small(), pytest.raises(UserError):
        cli.load_config(path)


@pytest.fixture
def evil_model(tmp_path):
    """Return a model's folder with Python files that would create the canary, and pickled weights."""
    folder = tmp_path / "evil"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\nclass Evil: pass\n"
    (folder / "modeling_evil.py").write_text(code)
    (folder / "configuration_evil.py").write_text(code)
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config = {
        "model_type": "evil",
        "architectures": ["Evil"],
        "auto_map": auto,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["evil", "gpt2"])
def test_code_in_a_models_folder_never_runs(config, evil_model, payload, model_type):
    (evil_model / "pytorch_model.bin").write_bytes(payload)
    fields = json.loads((evil_model / "config.json").read_text()) | {"model_type": model_type}
    (evil_model / "config.json").write_text(json.dumps(fields))
    assert_user_error(lambda: train(config(init_from=str(evil_model), model={})), str(evil_model))


def test_code_in_a_data_sets_folder_never_runs(processes, options, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    values = options()
    values["data"] = values["data"] | {"sources": [{"type": "huggingface", "name": str(folder)}]}
    done = processes.run("training.train:main", "--config", str(write_config(tmp_path / "a.yaml", values)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {folder}: its splits cannot be listed: ")
    assert not (tmp_path / "canary").exists()


BUILTINS = {"eval", "exec", "compile", "__import__"}
BANNED = {  # including everything inside them
    "builtins", "cloudpickle", "dill", "joblib", "marshal", "pickle", "_pickle", "runpy", "shelve",
    "os.exec*", "os.popen", "os.posix_spawn*", "os.spawn*", "os.startfile", "os.system", "tempfile.mktemp",
    "np.load", "numpy.load", "*.read_pickle", "yaml.load*", "yaml.full_load*", "yaml.unsafe_load*",
    "torch.load", "torch.distributed.checkpoint", "torch.hub", "torch.jit.load", "torch.package", "torch.serialization",
    "*.all_gather_object", "*.broadcast_object_list", "*.gather_object", "*.recv_object_list", "*.scatter_object_list",
    "*.send_object_list",
}  # fmt: skip
MUST_BE_FALSE = {"allow_pickle", "shell", "trust_remote_code"}
# The export's check opens the folder that this package has just written, in its own process, as a user will.
ALLOWED = {
    "weights/open_export.py": {"trust_remote_code=own_code"},
    "logging/python_code.py": {"compile"},  # to a tree only, which nothing executes
}


def dangers(source: str) -> set[tuple[int, str]]:
    """Return (line, full name) of each call that could execute a file's content, under any import name."""
    tree, dangerous = ast.parse(source), set()
    names = dict(imported for node in ast.walk(tree) for imported in imports(node))
    for node in ast.walk(tree):
        used = [full for _, full in imports(node)]
        if isinstance(node, ast.Attribute) and not banned(dotted(node.value, names) or ""):
            used.append(dotted(node, names))
        dangerous |= {(node.lineno, full) for full in used if banned(full)}
        if isinstance(node, ast.Name) and node.id in BUILTINS - names.keys() and isinstance(node.ctx, ast.Load):
            dangerous.add((node.lineno, node.id))
        dangerous |= {(value.lineno, f"{name}={ast.unparse(value)}") for name, value in true_options(node)}
    return dangerous


def imports(node: ast.AST) -> list[tuple[str, str]]:
    """Return (local name, full name) of each import of a statement."""
    if isinstance(node, ast.Import):
        return [(a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2 for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
    return []


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the full name of `a.b.c`; `.c` of a computed value; None if it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names) or ''}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else None


def banned(full: str) -> bool:
    """Return True for a banned name, for a name within it, and for an import of all of its module."""
    parts = full.split(".")
    beginnings = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if parts[-1] == "*":
        return any(name.startswith(full[:-1]) for name in BANNED)
    return any(fnmatchcase(beginning, name) for beginning in beginnings for name in BANNED)


def true_options(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """Return the options of a call or a dict that must be the literal False and are not."""
    values = []
    if isinstance(node, ast.Call):
        values = [(word.arg, word.value) for word in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        values = list(zip(keys, node.values, strict=True))
    return [(name, value) for name, value in values if name in MUST_BE_FALSE and ast.unparse(value) != "False"]


def test_nothing_in_the_package_executes_the_content_of_a_file():
    root, violations = ROOT / "training", []
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        allowed = ALLOWED.get(name, set())
        violations += [(name, line, full) for line, full in dangers(path.read_text()) if full not in allowed]
    assert violations == []


def test_every_danger_is_detected():
    sources = [
        "eval(text)", "exec(text)", "__import__(name)", "os.system(text)", "torch.load(path)", "yaml.load(text)",
        "np.load(path)", "import pickle", "from dill import loads", "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)", "np.fromfile(path, allow_pickle=True)",
        "from torch import load", "from torch import load as read", "import torch as t\nt.load(path)",
        "import torch\nread = torch.load", "from torch import *", "from os import system",
        "import os as o\no.popen(text)",
        "yaml.unsafe_load(text)", "yaml.full_load(text)", "import yaml as y\ny.unsafe_load_all(text)",
        "torch.jit.load(path)", "from torch import jit\njit.load(path)", "torch.hub.load(name)",
        "from torch import hub",
        "import torch.distributed.checkpoint as dcp", "from torch.distributed import checkpoint",
        "from torch.distributed.checkpoint import load", "dist.all_gather_object(found, mine)",
        "from torch.distributed import broadcast_object_list", "group().gather_object(mine)", "import runpy",
        "import pandas as pd\npd.read_pickle(path)", "from pandas import read_pickle", "os.execvp(text, words)",
        "from os import execv", "AutoModel.from_pretrained(path, trust_remote_code=own_code)",
        "AutoModel.from_pretrained(path, trust_remote_code=not False)", "options = {'trust_remote_code': asked}",
        "subprocess.run(text, shell=asked)", "map(eval, texts)",
    ]  # fmt: skip
    assert [source for source in sources if len(dangers(source)) != 1] == []


def test_harmless_code_is_no_danger():
    sources = [
        "re.compile(text)", "from re import compile\ncompile(text)", "torch.compile(model)", "json.load(file)",
        "x.eval()",
        "AutoModel.from_pretrained(path, trust_remote_code=False)", "import torch.distributed\ntorch.save",
    ]  # fmt: skip
    assert [source for source in sources if dangers(source)] == []
