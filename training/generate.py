"""Continue prompts with a trained model.

python -m training.generate --run runs/quickstart --prompt "def "
python -m training.generate --run runs/quickstart --prompts prompts.txt --samples 4 --json > texts.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError
from training.options.cli import Parser

if TYPE_CHECKING:
    from training.model.continuation import Continuation

# What each number may be, in words and as a test.
LIMITS = {
    "tokens": ("1 or more", lambda n: n >= 1),
    "samples": ("1 or more", lambda n: n >= 1),
    "temperature": ("a number of 0 or more", lambda x: 0 <= x < math.inf),
    "top_k": ("0 or more", lambda n: n >= 0),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("from 0.01 to 100", lambda x: 0.01 <= x <= 100),
    "seed": ("0 or more", lambda n: n >= 0),
    "micro_batch": ("1 or more", lambda n: n >= 1),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What is asked for, with the prompts read. Raises UserError."""
    parser = Parser(prog="python -m training.generate", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated; '' begins a document")
    add("--prompts", metavar="FILE", help="prompts, one a line; in a .jsonl, each a JSON object's `prompt`")
    add("--samples", type=int, default=1, help="continuations of each prompt (default %(default)s)")
    add("--tokens", type=int, default=200, help="most tokens to write (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)")
    add("--top_k", type=int, default=50, help="draw among the so many likeliest; 0: among all (default %(default)s)")
    add("--top_p", type=float, default=1.0, help="draw among the likeliest that make up so much (default %(default)s)")
    add("--min_p", type=float, default=0.0, help="least probability, relative to the likeliest's (default %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: what is there comes less (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    add("--micro_batch", type=int, default=64, help="texts at a time; memory and speed only (default %(default)s)")
    add("--json", action="store_true", help="write a JSON object a line: prompt, text, finish (end, stop, length)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    found = parser.parse_args(argv)
    for name, (words, allowed) in LIMITS.items():
        if not allowed(getattr(found, name)):
            raise UserError(f"--{name}: {getattr(found, name)} is not {words}")
    if "" in found.stop:
        raise UserError("--stop: an empty text is everywhere; give the text to end before")
    if (found.prompt is None) == (found.prompts is None):
        raise UserError("give --prompt or --prompts, one of the two; --prompt '' begins a document")
    found.stop = [_decoded(stop) for stop in found.stop]
    found.prompt = read_prompts(Path(found.prompts)) if found.prompt is None else [_decoded(p) for p in found.prompt]
    return found


def _decoded(argument: str) -> str:
    """An argument of the command line whose bytes were not all UTF-8, without the others."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file. Raises UserError that names it."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if lines[-1] == "":  # the last line's end
        lines.pop()
    if not lines:
        raise UserError(f"--prompts {path}: empty; write a prompt on each line")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise UserError(f'--prompts {path}:{number}: not a JSON object such as {{"prompt": "def "}}')
    return prompts


def main(argv: list[str] | None = None) -> int:
    """The command: prompts and their continuations on standard output. Exit status 0, or 2 for wrong input."""
    sys.stdout.reconfigure(errors="replace")  # a text may hold what the terminal's encoding does not
    try:
        generate(arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has gone; without this Python complains once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def generate(asked: argparse.Namespace) -> None:
    """Write every prompt with its continuations to standard output, in order; a single one as it is drawn."""
    from training.engine import load_run as trained
    from training.model.continuation import continue_texts, encode_prompt
    from training.model.sampling import SamplingParams

    model, (_, _, tokenizer, *_) = trained.load(asked.run, asked.device)
    ids, limit = [encode_prompt(tokenizer, prompt) for prompt in asked.prompt], model.config.n_positions
    for number, prompt in enumerate(ids, 1):
        if len(prompt) > limit:
            raise UserError(
                f"--prompt{'' if asked.prompts is None else 's'}: prompt {number} is {len(prompt):,} tokens with the "
                f"one that begins a document, more than the {limit:,} of the model's context; shorten it"
            )
    params = SamplingParams(asked.temperature, asked.top_k or None, asked.top_p, asked.min_p, asked.repetition_penalty)
    rows = [(prompt, sample) for prompt in range(len(ids)) for sample in range(asked.samples)]
    alone = len(rows) == 1 and not asked.json
    if alone:
        print(asked.prompt[0], end="", flush=True)
    for first in range(0, len(rows), asked.micro_batch):
        some = rows[first : first + asked.micro_batch]
        texts = continue_texts(
            model,
            tokenizer,
            [ids[prompt] for prompt, _ in some],
            asked.tokens,
            seeds=[(asked.seed, sample) for _, sample in some],
            params=params,
            stops=asked.stop,
            on_text=partial(print, end="", flush=True) if alone else None,
        )
        for (prompt, sample), text in zip(some, texts, strict=True):
            print("" if alone else written(asked, prompt, sample, text), flush=True)


def written(asked: argparse.Namespace, prompt: int, sample: int, text: Continuation) -> str:
    """A text by the numbers of its prompt and of its sample: a line of JSON, or a heading and the text."""
    before = asked.prompt[prompt]
    if asked.json:
        return json.dumps({"prompt": before, "text": text.text, "finish": text.finish_reason})
    places = (("prompt", prompt, len(asked.prompt)), ("sample", sample, asked.samples))
    heading = ", ".join(f"{name} {number + 1} of {count}" for name, number, count in places if count > 1)
    return f"--- {heading} ---\n{before}{text.text}\n"


if __name__ == "__main__":
    sys.exit(main())
