"""Train six short runs and hash all that they compute, to check that a change of code changes no result.

    python tests/same_bits.py record FILE [--at COMMIT]       write the digests of this tree, or of a commit, to FILE
    python tests/same_bits.py compare FILE                    compare this tree with FILE, bit for bit
    python tests/same_bits.py compare [FILE] --against COMMIT compare this tree with a commit, on this machine

Bits depend on the processor and the version of PyTorch, so `--against` trains both trees here. A commit is checked out
into a temporary folder. The exit status is 1 if a run differs.

The runs: a dense model; MoE with both kinds of balancing and Muon; packed documents with sliding-window and latent
attention; fp16; two ranks with split experts; and a resumed run with Switch balancing and skipped spikes.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS, RESUMED_AT = 10, 4
RECORDED = (
    "step", "loss", "grad_norm", "val_loss", "learning_rate", "val_bits_per_byte", "samples", "expert_load",
    "router_layers", "skipped_steps",
)  # fmt: skip
MOE = {"type": "moe", "n_experts": 4, "hidden": 32, "n_shared": 1, "jitter": 0.1}
SIGMOID_MOE = {"type": "moe", "n_experts": 8, "top_k": 3, "hidden": 16, "scoring": "sigmoid", "balance": "bias",
               "gated": True, "activation": "silu"}  # fmt: skip
MODERN = {"position": "rope", "norm": "rmsnorm", "bias": False}
WINDOW = {"type": "attention", "n_kv_head": 1, "window": 24, "qk_norm": True}
LATENT = {"type": "latent", "kv_rank": 16, "rope_dim": 8, "head_dim": 16}
# The options of each run; the common ones are below. "model" and "parallel" are merged, the others replaced.
RUNS = {
    "dense": {},
    "moe": {"model": MODERN | {"blocks": [{"ffn": {**MOE, "balance": "both"}}, {"ffn": SIGMOID_MOE}]},
            "optim": {"type": "muon"}},
    "packed": {"model": MODERN | {"isolate_documents": True, "blocks": [{"mixer": WINDOW}, {"mixer": LATENT}]}},
    "fp16": {"precision": "fp16", "micro_batch": 2},
    "ranks": {"model": {"blocks": [{"ffn": {**MOE, "balance": "both"}}, {}]},
              "parallel": {"mesh": {"expert": 2}, "device": "cpu"}},
    "resume": {"model": {"blocks": [{"ffn": {**MOE, "balance": "switch"}}, {"mixer": {"type": "differential"}}]},
               "skip_spikes": 6.0},
}  # fmt: skip
N_RANKS = {"ranks": 2}

Start = Callable[[list[str], int], None]  # train with (command-line arguments, number of ranks)


def write_inputs(folder: Path) -> dict[str, Path]:
    """Write the text and every run's options below `folder`; returns the files of options."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(300)]
    weights = [1 / (i + 1) for i in range(300)]
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(240):
            file.write(json.dumps({"text": " ".join(draw.choices(words, weights, k=draw.randint(20, 160)))}) + "\n")
    common = {
        "out_dir": str(folder / "runs"),
        "steps": STEPS,
        "batch_tokens": 512,
        "micro_batch": 4,
        "precision": "fp32",
        "seed": 3,
        # No rows beyond the tokenizer's 400 tokens: old commits did not mask them.
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 400},
        "data": {
            "sources": [{"type": "files", "paths": [str(folder / "text.jsonl")]}],
            "tokenizer": {"type": "bpe", "vocab_size": 400},
            "val_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "optim": {"learning_rate": 3e-3},
        "schedule": {"type": "constant", "warmup_steps": 2},  # schedules that decay end one step earlier since
        "eval": {"every": 5, "tokens": 1024, "prompts": ["a b"], "sample_tokens": 4},
        "checkpoint": {"every": RESUMED_AT, "keep": 9},
        "logging": {"every": 2, "tensorboard": False},
    }
    paths = {}
    for name, changes in RUNS.items():
        options = common | {"name": name} | changes
        options["model"] = common["model"] | changes.get("model", {})
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(json.dumps(options))
    return paths


def train_all(folder: Path, start: Start) -> dict[str, dict]:
    """Train every run below `folder`; returns the digest of each."""
    digests = {}
    for name, path in write_inputs(folder).items():
        start(["--config", str(path)], N_RANKS.get(name, 1))
        run = folder / "runs" / name
        if name == "resume":
            checkpoint = run / "checkpoints" / f"step-{RESUMED_AT:08d}"
            start(["--config", str(path), "--resume", str(checkpoint)], 1)
        digests[name] = digest(run)
    return digests


def digest(run: Path) -> dict:
    """Return the rows of a run without times, and a hash of every tensor of its last checkpoint."""
    from safetensors import safe_open

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = {}
    for path in sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        kind = path.stem.partition("-")[0]  # model or optimizer, whatever the number of files
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file of safetensors is no dict)
                tensors[f"{kind}:{name}"] = hashlib.sha256(file.get_tensor(name).numpy().tobytes()).hexdigest()[:12]
    return {"rows": [{key: row[key] for key in RECORDED if key in row} for row in rows], "tensors": tensors}


def by_command(tree: Path) -> Start:
    """Train with the package in `tree`, in processes of their own."""

    def start(arguments: list[str], n_ranks: int) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
        command = [sys.executable, *(launcher if n_ranks > 1 else []), "-m", "training.train", *arguments]
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} in {tree}: status {done.returncode}\n{done.stderr}")

    return start


def of_tree(tree: Path) -> dict[str, dict]:
    """Return the digests of the package in `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        return train_all(Path(folder), by_command(tree))


def has_commit(commit: str) -> bool:
    """Return True if the clone holds the commit."""
    result = subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    return result.returncode == 0


def of_commit(commit: str) -> dict[str, dict]:
    """Return the digests of a commit, checked out into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        return of_tree(Path(folder))


def differences(ours: dict[str, dict], theirs: dict[str, dict]) -> list[str]:
    """Return one line for each run that differs: its first different row, and the number of different tensors."""
    lines = []
    for name in theirs:
        if ours.get(name) == theirs[name]:
            continue
        one, other = ours.get(name, {"rows": [], "tensors": {}}), theirs[name]
        rows = [(a, b) for a, b in zip(one["rows"], other["rows"], strict=False) if a != b]
        n_tensors = sum(one["tensors"].get(key) != value for key, value in other["tensors"].items())
        first = f"first different row {rows[0][0]}, was {rows[0][1]}" if rows else "the same rows"
        lines.append(f"{name}: {n_tensors} of {len(other['tensors'])} tensors differ, {first}")
    return lines


def main(arguments: list[str]) -> int:
    """Run the command above."""
    parser = argparse.ArgumentParser(prog="python tests/same_bits.py", description="Record or compare six short runs.")
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path, nargs="?", help="JSON file of the digests")
    parser.add_argument("--at", metavar="COMMIT", help="record: the commit to train instead of this tree")
    parser.add_argument("--against", metavar="COMMIT", help="compare: the commit to train instead of reading FILE")
    args = parser.parse_args(arguments)
    if args.file is None and args.against is None:
        parser.error("FILE is needed without --against")
    if args.action == "record":
        digests = of_commit(args.at) if args.at else of_tree(ROOT)
        args.file.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
        return 0
    theirs = of_commit(args.against) if args.against else json.loads(args.file.read_text())
    if args.against and args.file:
        args.file.write_text(json.dumps(theirs, indent=1, sort_keys=True) + "\n")
    wrong = differences(of_tree(ROOT), theirs)
    print("\n".join(wrong) or f"the same bits in all {len(theirs)} runs")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
