"""Talk with a model in the terminal: a turn of the user a line, and the model's answer after it."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from training.data.chat_template import ASSISTANT, RESERVED, Message
from training.data.dialogues import encode_turn, end_tokens
from training.engine.load_run import LoadedModel
from training.model.generation import continue_texts
from training.terminal import print_note, print_text, valid_utf8

print_exact = partial(print_text, is_exact=True)


def talk(loaded: LoadedModel, system: Sequence[Message], n_tokens: int, *, seed: int, **options: Any) -> None:
    """Answer each line of standard input with up to `n_tokens` tokens, until it ends. An empty line starts over.

    `options` are those of `continue_texts`. Raises UserError if the model has no chat template.
    """
    model, tokenizer, dialogue = loaded.model, loaded.tokenizer, list(system)
    ends = end_tokens(tokenizer)
    if sys.stdin.isatty():
        print_note(f"a dialogue with {loaded.title}: a line is a turn, an empty line starts over, Ctrl-D ends")
    for number, line in enumerate(user_lines()):
        if not line:
            dialogue = list(system)
            continue
        if RESERVED.search(line):
            print_note("this turn holds a code point that is no character; leave it out")
            continue
        dialogue.append({"role": "user", "content": line})
        dialogue, prompt = fit_context(tokenizer, dialogue, len(system), model.config.n_positions)
        if not prompt:
            continue
        (answer,) = continue_texts(
            model,
            tokenizer,
            [prompt],
            n_tokens,
            seeds=[(seed, number)],
            end_tokens=ends,
            on_text=print_exact,
            **options,
        )
        print_exact("\n")
        dialogue.append({"role": ASSISTANT, "content": RESERVED.sub("", answer.text)})


def user_lines() -> Iterator[str]:
    """Yield the lines of standard input without their ends, after a mark on a terminal."""
    is_interactive = sys.stdin.isatty()
    while True:
        if is_interactive:
            print_exact("> ")
        line = sys.stdin.readline()
        if not line:
            return
        yield valid_utf8(line.rstrip("\r\n"))


def fit_context(
    tokenizer: Any, dialogue: list[Message], n_system: int, n_positions: int
) -> tuple[list[Message], list[int]]:
    """Leave out the oldest turns until an eighth of the context is free; return what remains, and its tokens.

    If the last turn alone does not fit, it is left out with a note, and there are no tokens.
    """
    room, system = n_positions - n_positions // 8, dialogue[:n_system]
    if (n_alone := len(encode_turn(tokenizer, [*system, dialogue[-1]]))) > room:
        print_note(f"this turn is {n_alone:,} tokens, more than the {room:,} there is room for; shorten it")
        return dialogue[:-1], []
    while len(prompt := encode_turn(tokenizer, dialogue)) > room:
        print_note("the oldest turns no longer fit into the context, and are left out", once=True)
        dialogue = system + dialogue[n_system + 2 :]
    return dialogue, prompt
