"""Continue prompts with a trained model.

python -m training.generate --run runs/quickstart --prompt "def "
python -m training.generate --run runs/quickstart --prompts prompts.txt --samples 4 --json > texts.jsonl
python -m training.generate --run openai-community/gpt2 --prompt "Once upon a time"
python -m training.generate --run runs/chat --chat
"""

import argparse
import codecs
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError, command
from training.options.cli import MODEL_HELP, Parser
from training.terminal import each_note_once, print_text, valid_utf8

if TYPE_CHECKING:
    from training.data import Tokenizer
    from training.data.chat_template import Message

print_exact = partial(print_text, is_exact=True)

TOP_P_HELP = "sample from the most likely tokens whose probabilities add up to this"
# The default of each numeric flag, its help, and its allowed values as text and as a predicate.
NUMBERS = {
    "samples": (1, "continuations per prompt", "1 or more", lambda n: n >= 1),
    "tokens": (200, "maximum tokens per continuation", "1 or more", lambda n: n >= 1),
    "temperature": (0.8, "0: always the most likely token", "a number of 0 or more", lambda x: 0 <= x < math.inf),
    "top_k": (50, "sample from the k most likely tokens; 0: all", "0 or more", lambda n: n >= 0),
    "top_p": (1.0, TOP_P_HELP, "above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": (0.0, "minimum probability relative to the top token", "from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": (1.0, "above 1: repeat less", "from 0.01 to 100", lambda x: 0.01 <= x <= 100),
    "seed": (0, "seed of the samples", "0 or more", lambda n: n >= 0),
    "micro_batch": (64, "texts per forward; memory and speed only", "1 or more", lambda n: n >= 1),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, with the prompts read into `prompt`. Raises UserError."""
    parser = Parser(prog="python -m training.generate", description=__doc__)
    add = parser.add_argument
    parser.add_path("--run", required=True, help=MODEL_HELP)
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated; '' starts a document")
    prompts_help = "file with one prompt per line; in a .jsonl, the `prompt` of each object"
    parser.add_path("--prompts", metavar="FILE", help=prompts_help)
    add("--chat", action="store_true", help="prompts are a user's turns; without prompts: talk, a turn a line")
    add("--system", metavar="TEXT", help="with --chat: instructions before the first turn")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    for name, (default, text, _, _) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default %(default)s)")
    add("--json", action="store_true", help="write one JSON object per line: prompt, text, finish (end, stop, length)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args(argv)
    for name, (_, _, allowed, is_allowed) in NUMBERS.items():
        if not is_allowed(getattr(args, name)):
            raise UserError(f"--{name}: {getattr(args, name)} is not {allowed}")
    if "" in args.stop:
        raise UserError("--stop: '' matches everywhere; give the text to end before")
    if (args.prompt is not None and args.prompts is not None) or (args.prompt is args.prompts and not args.chat):
        raise UserError("give either --prompt or --prompts; --prompt '' starts a document; --chat talks without either")
    if args.system is not None and not args.chat:
        raise UserError("--system: needs --chat")
    args.stop = [valid_utf8(stop) for stop in args.stop]
    args.system = args.system and valid_utf8(args.system)
    if args.prompt is args.prompts:
        if args.json or args.samples != 1:
            raise UserError(f"{'--json' if args.json else '--samples'}: needs --prompt or --prompts beside --chat")
        return args
    args.prompt = read_prompts(Path(args.prompts)) if args.prompt is None else [valid_utf8(p) for p in args.prompt]
    return args


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file of UTF-8, or of UTF-16 with its mark. Raises UserError with its name and line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text:
        raise UserError(f"--prompts {path}: empty; write a prompt on each line")
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise UserError(f"--prompts {path}:{line}: a NUL, which no text has; save the file as UTF-8")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
            prompts[-1].encode()  # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'--prompts {path}:{number}: not a JSON object such as {{"prompt": "def "}}') from None
    return prompts


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command: write prompts and their continuations to standard output."""
    generate(parse_arguments(argv))
    return 0


def generate(args: argparse.Namespace) -> None:
    """Write each prompt with its continuations to standard output; if there is only one text, token by token."""
    from training.engine.chat import talk
    from training.engine.load_run import load_model
    from training.model.generation import SamplingParams, continue_texts

    loaded = load_model(args.run, args.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    params = SamplingParams(args.temperature, args.top_k or None, args.top_p, args.min_p, args.repetition_penalty)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.prompt is None:
        with each_note_once():
            talk(loaded, system, args.tokens, seed=args.seed, params=params, stops=args.stop)
        return
    prompts, ends = encode_prompts(args, tokenizer, system, model.config.n_positions)
    rows = itertools.product(range(len(prompts)), range(args.samples))
    is_streamed = len(prompts) * args.samples == 1 and not args.json
    if is_streamed:
        print_exact(args.prompt[0] + "\n" * args.chat)
    while batch := list(itertools.islice(rows, args.micro_batch)):
        texts = continue_texts(
            model,
            tokenizer,
            [prompts[prompt] for prompt, _ in batch],
            args.tokens,
            seeds=[(args.seed, sample) for _, sample in batch],
            params=params,
            stops=args.stop,
            end_tokens=ends,
            on_text=print_exact if is_streamed else None,
        )
        for (prompt, sample), text in zip(batch, texts, strict=True):
            before = args.prompt[prompt]
            if is_streamed:
                print_exact("\n")
            elif args.json:
                output = {"prompt": before, "text": text.text, "finish": text.finish_reason}
                print_exact(json.dumps(output) + "\n")
            else:
                numbers = (("prompt", prompt, len(args.prompt)), ("sample", sample, args.samples))
                heading = ", ".join(f"{name} {number + 1} of {count}" for name, number, count in numbers if count > 1)
                between = "\n" * args.chat
                print_exact(f"--- {heading} ---\n{before}{between}{text.text}\n\n")


def encode_prompts(
    args: argparse.Namespace, tokenizer: "Tokenizer", system: list["Message"], limit: int
) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of each prompt, and the tokens besides the end-of-text token that end its continuation.

    Raises UserError for a prompt longer than the context.
    """
    from training.data.dialogues import encode_turn, end_tokens
    from training.model.generation import encode_prompt

    if args.chat:
        turns = ([*system, {"role": "user", "content": prompt}] for prompt in args.prompt)
        prompts, ends = [encode_turn(tokenizer, turn) for turn in turns], end_tokens(tokenizer)
    else:
        prompts, ends = [encode_prompt(tokenizer, prompt) for prompt in args.prompt], []
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > limit:
            raise UserError(
                f"--prompt{'' if args.prompts is None else 's'}: prompt {number} is {len(prompt):,} tokens with the "
                f"{'chat template' if args.chat else 'start-of-document token'}, more than the {limit:,} of the "
                "model's context; shorten it"
            )
    return prompts, ends


if __name__ == "__main__":
    sys.exit(main())
