"""Chat templates: a dialogue as text, by a Jinja template of the convention of Transformers' tokenizers.

The model learns what a template writes for the assistant, up to the special token that ends the turn. A template may
mark these parts by `{% generation %}`, as in Transformers; else they are what it adds to the text before each of the
assistant's messages (with `add_generation_prompt`) for that message.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.errors import UserError
from training.files import read_bytes

Message = dict[str, Any]  # role, content, and fields that only some templates read
Tools = Sequence[dict[str, Any]]  # descriptions of functions, in the form that a template expects
ASSISTANT = "assistant"
# Code points that no text has (Unicode's noncharacters): around marked parts, and inside special tokens' names that
# stand in a message, which so remain ordinary text.
START, END, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
RESERVED = re.compile(f"[{START}{END}{ESCAPE}]")
# A template is a program that someone else wrote: it may fail in any of these ways.
TEMPLATE_ERRORS = (TemplateError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
TEMPLATE_ERRORS += (RuntimeError, MemoryError)


class Piece(NamedTuple):
    """A part of a dialogue's text that is encoded by itself."""

    text: str  # of a special token: its name
    is_target: bool = False  # the model learns to write it
    is_special: bool = False


class _MarkAnswers(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (as in Jinja's own extensions)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{START}{caller()}{END}"


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
    return text.replace(json.dumps(ESCAPE)[1:-1], ESCAPE)


# A template cannot reach Python's objects, nor change its variables: a model's folder runs no code.
ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_MarkAnswers, "jinja2.ext.loopcontrols"]
)
ENVIRONMENT.filters["tojson"] = _to_json
# Without `strftime_now`: with the date in them, the tokens of a run would be others tomorrow.
ENVIRONMENT.globals["raise_exception"] = _raise


class ChatTemplate:
    """A template with the names of a tokenizer's special tokens. Raises UserError, which names it, if it is none."""

    def __init__(self, source: str, name: str, special: Sequence[str], bos_token: str, end_of_text: str):
        self.name, self.bos_token, self.end_of_text = name, bos_token, end_of_text
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        self.template = compile_template(source, name)

    def pieces(self, messages: Sequence[Message], where: str = "", tools: Tools = ()) -> list[Piece]:
        """Return the pieces of a whole dialogue. Raises UserError, which begins with `where`."""
        text, targets = self._targets(messages, where, tools)
        pieces, position = [], 0
        for start, end in targets:
            pieces += [*self._split(text[position:start], False), *self._split(text[start:end], True)]
            position = end
        return [*pieces, *self._split(text[position:], False)]

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the pieces up to where the assistant's next message begins. Raises UserError."""
        text, _ = _without_marks(self._render(self._escape(messages, ""), "", is_prompt=True))
        return list(self._split(text, False))

    @cached_property
    def end_of_turn(self) -> str:
        """The name of the special token that ends the assistant's turn. Raises UserError if none does."""
        messages = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
        learned = [piece for piece in self.pieces(messages) if piece.is_target]
        if not learned or not learned[-1].is_special:
            raise UserError(self._no_end("", messages[1]))
        return learned[-1].text

    def _targets(self, messages: Sequence[Message], where: str, tools: Tools) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, the range of each answer in it)."""
        escaped, tools = self._escape(messages, where), self._escape(tools, where)
        marked = self._render(escaped, where, tools)
        if START in marked:
            return _without_marks(marked)
        ranges = []
        for i, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._render(escaped[:i], where, tools, is_prompt=True)
                after = self._render(escaped[: i + 1], where, tools)
                if not (marked.startswith(after) and after.startswith(before)):
                    problem = f"{self.name} writes message {i + 1} otherwise if others follow"
                    raise UserError(f"{_prefix(where)}{problem}; mark the assistant's text by {{% generation %}}")
                ends = [match.end() for match in self.special.finditer(after, len(before))]
                if not ends:
                    raise UserError(self._no_end(where, message))
                is_written = self.special.sub("", after[len(before) :]).strip() or not message.get("tool_calls")
                if is_written:  # else the template leaves the calls out, and the answer would be nothing
                    ranges.append((len(before), ends[-1]))
        return marked, ranges

    def _no_end(self, where: str, message: Message) -> str:
        turn = f"the turn of role {message['role']}"
        return f"{_prefix(where)}{self.name} ends {turn} without a special token such as {self.end_of_text}; add one"

    def _render(self, messages: Sequence[Message], where: str, tools: Tools = (), is_prompt: bool = False) -> str:
        """Return the text of escaped messages."""
        try:
            return self.template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=is_prompt,
                bos_token=self.bos_token,
                eos_token=self.end_of_text,
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{_prefix(where)}{self.name}: {' '.join(str(error).split())}") from None

    def _escape(self, value: Any, where: str) -> Any:
        """Return messages, or a value in them, with ESCAPE inside special tokens' names."""
        if isinstance(value, dict):
            return {name: self._escape(item, where) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape(item, where) for item in value]
        if not isinstance(value, str):
            return value
        if match := RESERVED.search(value):
            raise UserError(f"{_prefix(where)}a message holds U+{ord(match.group()):04X}, which is no character")
        return self.special.sub(lambda name: f"{name[0][:1]}{ESCAPE}{name[0][1:]}", value)

    def _split(self, text: str, is_target: bool) -> Iterator[Piece]:
        """Yield special tokens and the text between them."""
        position = 0
        for match in self.special.finditer(text):
            if ordinary := text[position : match.start()].replace(ESCAPE, ""):
                yield Piece(ordinary, is_target)
            yield Piece(match.group(), is_target, is_special=True)
            position = match.end()
        if ordinary := text[position:].replace(ESCAPE, ""):
            yield Piece(ordinary, is_target)


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return (text without START and END, the ranges that they enclosed)."""
    text, ranges = "", []
    for part in re.split(f"({START}[^{END}]*{END})", marked):
        if part.startswith(START):
            ranges.append((len(text), len(text) + len(part) - 2))
        text += part.strip(START + END)
    return text, ranges


def compile_template(source: str, name: str) -> Template:
    """Return a template. Raises UserError, which names it, if it is none."""
    try:
        return ENVIRONMENT.from_string(source)
    except TEMPLATE_ERRORS as error:
        raise UserError(f"{name}: not a Jinja template: {' '.join(str(error).split())}") from None


def default_template() -> str:
    """Return the template that this package brings: roles as text, and an end-of-text token after each answer."""
    return (files("training.data") / "chat_template.jinja").read_text(encoding="utf-8")


def read_template(path: Path) -> str:
    """Return the source of a template from a file. Raises UserError if it cannot be read, or is none."""
    try:
        source = read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    compile_template(source, str(path))
    return source
