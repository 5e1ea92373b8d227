"""Continue prompts with a trained model.

python -m training.generate --run runs/quickstart --prompt "def "
python -m training.generate --run runs/quickstart --prompts prompts.txt --samples 4 --json > texts.jsonl
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError, command
from training.options.cli import Parser

if TYPE_CHECKING:
    from training.model.generation import Continuation

# The allowed values of each numeric flag, as text and as a predicate.
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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, with the prompts read into `prompt`. Raises UserError."""
    parser = Parser(prog="python -m training.generate", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated; '' starts a document")
    add("--prompts", metavar="FILE", help="file with one prompt per line; in a .jsonl, the `prompt` of each object")
    add("--samples", type=int, default=1, help="continuations per prompt (default %(default)s)")
    add("--tokens", type=int, default=200, help="maximum tokens per continuation (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token (default %(default)s)")
    add("--top_k", type=int, default=50, help="sample from the k most likely tokens; 0: all (default %(default)s)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens whose probabilities add up to this (default %(default)s)",
    )
    add("--min_p", type=float, default=0.0, help="minimum probability relative to the top token (default %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the samples (default %(default)s)")
    add("--micro_batch", type=int, default=64, help="texts per forward; memory and speed only (default %(default)s)")
    add("--json", action="store_true", help="write one JSON object per line: prompt, text, finish (end, stop, length)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args(argv)
    for name, (allowed, is_allowed) in LIMITS.items():
        if not is_allowed(getattr(args, name)):
            raise UserError(f"--{name}: {getattr(args, name)} is not {allowed}")
    if "" in args.stop:
        raise UserError("--stop: '' matches everywhere; give the text to end before")
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either --prompt or --prompts; --prompt '' starts a document")
    args.stop = [_valid_utf8(stop) for stop in args.stop]
    args.prompt = read_prompts(Path(args.prompts)) if args.prompt is None else [_valid_utf8(p) for p in args.prompt]
    return args


def _valid_utf8(argument: str) -> str:
    """Return a command-line argument with bytes that are not UTF-8 replaced."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file. Raises UserError with its name and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if lines[-1] == "":  # after the last newline
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


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command: write prompts and their continuations to standard output."""
    sys.stdout.reconfigure(errors="replace")  # a text may hold characters that the terminal's encoding lacks
    try:
        generate(parse_arguments(argv))
    except BrokenPipeError:  # the reader closed the pipe; without this Python prints an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def generate(args: argparse.Namespace) -> None:
    """Write each prompt with its continuations to standard output; if there is only one text, token by token."""
    from training.engine.load_run import load_model
    from training.model.generation import SamplingParams, continue_texts, encode_prompt

    model, run = load_model(args.run, args.device)
    prompts, limit = [encode_prompt(run.tokenizer, prompt) for prompt in args.prompt], model.config.n_positions
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > limit:
            raise UserError(
                f"--prompt{'' if args.prompts is None else 's'}: prompt {number} is {len(prompt):,} tokens with the "
                f"start-of-document token, more than the {limit:,} of the model's context; shorten it"
            )
    params = SamplingParams(args.temperature, args.top_k or None, args.top_p, args.min_p, args.repetition_penalty)
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(args.samples)]
    is_streamed = len(rows) == 1 and not args.json
    if is_streamed:
        print(args.prompt[0], end="", flush=True)
    for first in range(0, len(rows), args.micro_batch):
        batch = rows[first : first + args.micro_batch]
        texts = continue_texts(
            model,
            run.tokenizer,
            [prompts[prompt] for prompt, _ in batch],
            args.tokens,
            seeds=[(args.seed, sample) for _, sample in batch],
            params=params,
            stops=args.stop,
            on_text=partial(print, end="", flush=True) if is_streamed else None,
        )
        for (prompt, sample), text in zip(batch, texts, strict=True):
            print("" if is_streamed else format_text(args, prompt, sample, text), flush=True)


def format_text(args: argparse.Namespace, prompt: int, sample: int, text: "Continuation") -> str:
    """Format one continuation: a line of JSON, or a heading with the prompt's and sample's number, and the text."""
    before = args.prompt[prompt]
    if args.json:
        return json.dumps({"prompt": before, "text": text.text, "finish": text.finish_reason})
    numbers = (("prompt", prompt, len(args.prompt)), ("sample", sample, args.samples))
    heading = ", ".join(f"{name} {number + 1} of {count}" for name, number, count in numbers if count > 1)
    return f"--- {heading} ---\n{before}{text.text}\n"


if __name__ == "__main__":
    sys.exit(main())
