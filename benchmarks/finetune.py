"""Fine-tune a base model on 2,000 made questions with answers, and count the held-out questions that it answers.

    python benchmarks/finetune.py | tee benchmarks/results/finetune.txt

The base model is trained here on the standard library's source code and has seen no dialogue. The questions have three
forms; their numbers and words are drawn at random, and no held-out question is among the 2,000. An answer counts if it
is right to the letter and the model ends its turn after it. "Chance" is a guess by someone who knows the form.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from common import header

N_TRAIN, N_TEST = 2000, 300
WORDS = ["apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kitchen",
         "ladder", "mirror", "needle"]  # fmt: skip
BASE = """
name: base
steps: {steps}
batch_tokens: 8192
model: {{n_layer: 4, n_head: 4, n_embd: 128, n_positions: 256, position: rope, norm: rmsnorm, bias: false}}
data: {{sources: [{{type: stdlib}}], tokenizer: {{type: bpe, vocab_size: 2048}}}}
optim: {{type: muon}}
eval: {{every: null, tokens: 65536}}
"""
CHAT = """
name: chat
steps: {steps}
batch_tokens: 8192
init_from: {base}
data:
  sources: [{{paths: [questions.jsonl], messages_column: messages}}]
  tokenizer: {{type: file, path: {base}}}
optim: {{type: muon, muon_learning_rate: 0.01}}
schedule: {{type: cosine, warmup_steps: 10}}
eval: {{every: null}}
"""


def larger(draw: random.Random) -> tuple[str, str]:
    one, two = draw.sample(range(10, 100), 2)
    return f"Which is larger, {one} or {two}?", f"{max(one, two)} is larger."


def last_word(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, 3)
    return f"What is the last word of: {' '.join(words)}?", f"The last word is {words[-1]}."


def contains(draw: random.Random) -> tuple[str, str]:
    words, word = draw.sample(WORDS, 3), draw.choice(WORDS)
    word = draw.choice([word, draw.choice(words)])
    return f"Is {word} among {', '.join(words)}?", "Yes." if word in words else "No."


FORMS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], float]] = {
    "larger number": (larger, 1 / 2),
    "last word": (last_word, 1 / 3),
    "yes or no": (contains, 0.61),  # the share of the more frequent answer
}


def questions(n: int) -> list[tuple[str, str, str]]:
    """Return n different questions as (form, question, answer), the forms in turn."""
    draw, unique = random.Random(0), {}
    while len(unique) < n:
        for form, (make, _) in FORMS.items():
            question, answer = make(draw)
            unique.setdefault(question, (form, answer))
    return [(form, question, answer) for question, (form, answer) in unique.items()][:n]


def run(folder: str, *arguments: str) -> str:
    """Run a command of the package in a folder; return what it prints."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def count_right(folder: str, name: str, test: list[tuple[str, str, str]]) -> Counter[str]:
    """Return, by form, how many of the questions a run answers right, greedily."""
    Path(folder, "test.jsonl").write_text("".join(json.dumps({"prompt": row[1]}) + "\n" for row in test))
    command = ["training.generate", "--run", f"runs/{name}", "--chat", "--prompts", "test.jsonl", "--json"]
    lines = run(folder, *command, "--temperature", "0", "--tokens", "24").splitlines()
    right: Counter[str] = Counter()
    for line, (form, _, answer) in zip(lines, test, strict=True):
        output = json.loads(line)
        right[form] += output["finish"] == "end" and output["text"] == answer
    return right


def main() -> int:
    """Print the share of right answers of each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_steps", type=int, default=150, help="steps of the base model (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of fine-tuning (default %(default)s)")
    args = parser.parse_args()
    print(header(torch.device("cpu")))
    rows = questions(N_TRAIN + N_TEST)
    random.Random(1).shuffle(rows)
    train, test = rows[:N_TRAIN], rows[N_TRAIN:]
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "questions.jsonl").open("w") as file:
            for _, question, answer in train:
                turns = {"user": question, "assistant": answer}
                messages = [{"role": role, "content": content} for role, content in turns.items()]
                file.write(json.dumps({"messages": messages}) + "\n")
        Path(folder, "base.yaml").write_text(BASE.format(steps=args.base_steps))
        Path(folder, "chat.yaml").write_text(CHAT.format(steps=args.steps, base="runs/base/model"))
        run(folder, "training.train", "--config", "base.yaml")
        run(folder, "training.train", "--config", "chat.yaml")
        right = count_right(folder, "chat", test)
    n_of_form = Counter(form for form, _, _ in test)
    print(f"base model {args.base_steps} steps, fine-tuned for {args.steps} steps on {len(train):,} questions")
    for form, (_, chance) in FORMS.items():
        n = n_of_form[form]
        print(f"    {form:<14} {right[form]:>4} of {n} right ({right[form] / n:.0%}; chance {chance:.0%})")
    print(f"    {'all':<14} {right.total():>4} of {len(test)} right ({right.total() / len(test):.0%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
