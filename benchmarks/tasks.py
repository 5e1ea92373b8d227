"""Measure the scoring of tasks beside lm-eval's `hf` model, with the same weights, items and threads.

    python benchmarks/tasks.py | tee benchmarks/results/tasks.txt

The items continue lines of Python's standard library: the right next line, or three from elsewhere. lm-eval runs from
its own folder, which the Makefile installs; it has one request a batch, its default, or 16. Weights are random, as
speed does not depend on them. Times are those of scoring alone, without imports and loading. Float32.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import header

from training.config import ModelConfig, MultipleChoiceTask
from training.data.sources import StdlibReader, StdlibSource
from training.data.tokenizer import Tokenizer, train_bpe
from training.distributed.world import World
from training.engine.tasks import load_tasks, log_likelihoods
from training.model import GPT, init_weights
from training.weights import hf

HERE = Path(__file__).parent.parent
LM_EVAL = Path(sys.prefix, "lm-eval")
BAR = 3.0  # times the items per second of lm-eval, at its faster batch size
MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 512, "vocab_size": 8192}
N_ANSWERS = 4


def make_items(texts: list[str], n: int, n_lines: int) -> list[dict]:
    """Return items: some lines of a module, and four lines of which one follows."""
    draw, items = random.Random(0), []
    lines_of = [[line for line in text.splitlines() if line.strip()] for text in texts]
    lines_of = [lines for lines in lines_of if len(lines) > 2 * n_lines]
    while len(items) < n:
        lines = draw.choice(lines_of)
        first = draw.randrange(len(lines) - n_lines)
        answers = [lines[first + n_lines], *(draw.choice(draw.choice(lines_of)) for _ in range(N_ANSWERS - 1))]
        context = "\n".join(lines[first : first + n_lines])
        items.append({"query": context, "choices": [answer.strip()[:80] for answer in answers], "gold": 0})
    return items


def theirs(export: Path, items: Path, folder: Path, batch: int) -> tuple[float, list[float]]:
    """Return lm-eval's seconds and log-likelihoods."""
    task = folder / "task.yaml"
    task.write_text(
        "task: lines\noutput_type: multiple_choice\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {items}}}}}\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [
        sys.executable,
        "tests/score_by_lm_eval.py",
        str(export),
        str(folder / "out.json"),
        str(batch),
        str(task),
    ]
    environment = os.environ | {"PYTHONPATH": str(LM_EVAL), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    output = json.loads((folder / "out.json").read_text())
    return output["seconds"], [nats for item in output["answers"]["lines"] for nats, _ in item]


def main() -> int:
    """Print items per second of each side, and their ratio in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200, help="default %(default)s")
    parser.add_argument("--lines", type=int, default=8, help="lines of an item's context (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default %(default)s)")
    args = parser.parse_args()
    if not LM_EVAL.is_dir():
        raise SystemExit(f"no lm-eval in {LM_EVAL}; the Makefile installs it")
    print(header(torch.device("cpu"), "transformers"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [path.read_text(encoding="utf-8") for path in StdlibReader(StdlibSource()).modules.values()][:200]
        tokenizer: Tokenizer = train_bpe(texts, MODEL["vocab_size"])
        model = init_weights(GPT(ModelConfig.model_validate(MODEL)), 0).cast_for_inference()
        hf.write_model(folder / "export", model.state_dict(), model.config, tokenizer.end_of_text)
        tokenizer.save(folder / "export", model.config.n_positions)
        path = folder / "items.jsonl"
        items = make_items(texts, args.items, args.lines)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        config = MultipleChoiceTask(paths=(str(path),), prompt="{{ query }}", choices=("choices",), label="gold")

        rates: dict[str, list[float]] = {"this": [], "lm-eval, batch 1": [], "lm-eval, batch 16": []}
        for turn in range(args.rounds):
            began = time.perf_counter()
            tasks = load_tasks([config], tokenizer, model.config.n_positions)
            answers = [answer for each in tasks[0].answers for answer in each]
            nats = log_likelihoods(model, answers, World(0, 1, torch.device("cpu")))[:, 0].tolist()
            rates["this"].append(args.items / (time.perf_counter() - began))
            for batch in (1, 16):
                seconds, their_nats = theirs(folder / "export", path, folder, batch)
                rates[f"lm-eval, batch {batch}"].append(args.items / seconds)
                difference = max(abs(a - b) for a, b in zip(nats, their_nats, strict=True))
                if turn == 0:
                    print(f"{len(answers)} answers, batch {batch}: log-likelihoods apart by at most {difference:.1e}")
    for name, rate in rates.items():
        print(f"    {name:<18} {statistics.median(rate):8.1f} items/s  ({min(rate):.1f} to {max(rate):.1f})")
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["this"], rate, strict=True))
        for name, rate in rates.items()
        if name != "this"
    }
    for name, ratio in ratios.items():
        print(f"    this / {name}: {ratio:.1f}")
    is_met = min(ratios.values()) >= BAR
    print(f"    bar: at least {BAR:g}, {'met' if is_met else 'MISSED'}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
