"""Continue a prompt with a trained model.

python -m training.generate --run runs/quickstart --prompt "def "
"""

from __future__ import annotations

import argparse
import os
import sys

from training.errors import UserError


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run, finished or not, or of one of its checkpoints")
    parser.add_argument("--prompt", default="", help="text to continue; default: the beginning of a document")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="draw among the so many likeliest (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    found = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        if not getattr(found, name) >= least:
            parser.error(f"--{name}: {getattr(found, name)} is not {least} or more")
    found.prompt = found.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return found


def main(argv: list[str] | None = None) -> int:
    """The command: the prompt and its continuation on standard output, as it is drawn. Exit status 0, or 2."""
    asked = arguments(argv)
    try:
        generate(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has gone; without this Python complains once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def generate(asked: argparse.Namespace) -> None:
    """Write the prompt and the continuation to standard output, token by token."""
    import torch

    from training import trained
    from training.model.sampling import prompt_ids, sample

    _, model, tokenizer, *_ = trained.load(asked.run, asked.device)
    print(asked.prompt, end="", flush=True)
    new, written = [], ""
    for token in sample(
        model,
        prompt_ids(tokenizer, asked.prompt),
        asked.tokens,
        n_vocab=tokenizer.vocab_size,
        generator=torch.Generator().manual_seed(asked.seed),
        temperature=asked.temperature,
        top_k=asked.top_k,
        stop=tokenizer.end_of_text,
    ):
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may be several tokens
            print(text[len(written) :], end="", flush=True)
            written = text
    print(tokenizer.decode(new)[len(written) :])


if __name__ == "__main__":
    sys.exit(main())
