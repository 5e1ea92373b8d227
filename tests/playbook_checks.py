"""Train with all examples of the playbooks, in a copy of the package: python playbook_checks.py train"""

import json
import sys
from pathlib import Path

OPTIONS = {
    "name": "all",
    "steps": 4,
    "batch_tokens": 64,
    "precision": "fp32",
    "model": {
        "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16,
        "blocks": [{"mixer": {"type": "head_scale"}, "ffn": {"type": "normed_mlp"}}],
    },
    "data": {"sources": [{"type": "mbox", "path": "mail.mbox"}], "tokenizer": {"type": "byte"}, "val_fraction": 0.3},
    "optim": {"type": "sgd", "learning_rate": 1e-2},
    "schedule": {"type": "polynomial", "warmup_steps": 1, "final_ratio": 0.0},
    "parallel": {"loss": "whole"},
    "checkpoint": {"every": 2},
    "eval": {"every": 2},
    "logging": {"csv": True, "every": 1, "tensorboard": False},
}  # fmt: skip


def train() -> None:
    """Train four steps, go back to the second, and print facts about the run."""
    import contextlib

    import training
    from training import checkpoint
    from training.config import Config
    from training.train import train as train_run

    assert Path(training.__file__).is_relative_to(Path.cwd()), training.__file__
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "does", "it", "again"]
    messages = (f"From a Mon Jan  1 00:00:00 2024\n\n{' '.join(words[i % 7 :])} {i}\n\n" for i in range(40))
    Path("mail.mbox").write_text("".join(messages))
    config = Config.model_validate(OPTIONS)
    folder = Path("runs/all")
    with contextlib.redirect_stdout(sys.stderr):
        assert train_run(config) == 0
        assert train_run(config, resume=str(folder / "checkpoints/step-00000002")) == 0
    last = checkpoint.load(folder / "checkpoints/step-00000004")
    header = json.loads((folder / "run.json").read_text())["header"]
    facts = {
        "rows": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "summary_has_accuracy": "val_accuracy" in json.loads((folder / "summary.json").read_text()),
        "csv_steps": [int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()],
        "kernels": last.state["kernels"],
        "tensors": sorted(last.model),
        "optimizer_state": sorted({key.rpartition("/")[2] for key in last.optimizer}),
        "data": header["data"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    {"train": train}[sys.argv[1]]()
