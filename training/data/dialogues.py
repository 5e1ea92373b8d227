"""Rows with answers: a prompt with its completion, or a dialogue. A model learns the answers only.

A row becomes a document whose text has parts; `encode_dialogue` returns its tokens and which of them are targets.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.config import RowsConfig
from training.data.chat_template import ASSISTANT, Message, Piece, Tools
from training.data.row_files import to_text, value_of
from training.errors import UserError

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
OTHER_ROLES = {"human": "user", "gpt": ASSISTANT}  # of ShareGPT's files, whose messages have `from` and `value`


class Dialogue(NamedTuple):
    """One row: messages, or a prompt with its completion as the only message."""

    where: str  # for errors
    messages: tuple[Message, ...]
    prompt: str | None = None  # None: a chat template writes the messages
    tools: Tools = ()  # that the assistant may call

    @property
    def text(self) -> str:
        """All text of the row."""
        tools = [json.dumps(self.tools)] if self.tools else []
        return "\n".join([self.prompt or "", *(message["content"] for message in self.messages), *tools])

    @property
    def has_answer(self) -> bool:
        """True if there is text to learn."""
        answers = (message for message in self.messages if message["role"] == ASSISTANT)
        return any(answer["content"].strip() or answer.get("tool_calls") for answer in answers)


def to_dialogue(row: Any, config: RowsConfig, where: str) -> Dialogue:
    """Return the dialogue in a row's columns. Raises UserError if there is none."""
    if config.messages_column is not None:
        value = value_of(row, config.messages_column, where, "messages_column")
        return Dialogue(where, to_messages(value, config.messages_column, where), tools=to_tools(row, where))
    columns = {"prompt_column": config.prompt_column, "completion_column": config.completion_column}
    prompt, completion = (
        to_text(value_of(row, column, where, option), column, where) for option, column in columns.items()
    )
    return Dialogue(where, ({"role": ASSISTANT, "content": completion},), prompt)


def to_messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    """Return a column's messages as {role, content, and other fields that are not null}. Raises UserError.

    A text, as in .csv files, is read as JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {column!r} is not JSON ({error})") from None
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, not a list of messages with role and content")
    messages = []
    for number, message in enumerate(value, start=1):
        place = f"{where}: message {number} of {column!r}"
        if not isinstance(message, Mapping):
            raise UserError(f"{place} is {type(message).__name__}, not an object with role and content")
        names = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
        role, content = (message.get(name) for name in names)
        role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise UserError(f"{place}: its {names[0]} is {role!r}, not a name such as user or assistant")
        content = plain_content(content, message)
        if not isinstance(content, str):
            raise UserError(f"{place}: its {names[1]} is {type(content).__name__}, not text")
        others = {key: item for key, item in message.items() if key not in names and item is not None}
        messages.append({**others, "role": role, "content": to_text(content, names[1], place)})
    return tuple(messages)


def to_tools(row: Mapping[str, Any], where: str) -> Tools:
    """Return a row's `tools`, also if a text has them as JSON; () without any. Raises UserError if they are no list."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: 'tools' is not JSON ({error})") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(
            f"{where}: 'tools' is not a list of objects for a chat template; if it is something else, rename it"
        )
    return tuple(tools or ())


def plain_content(content: Any, message: Mapping[str, Any]) -> Any:
    """Return the text of a list of text parts, and "" for null beside tool calls; else the content itself."""
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


class EncodedText(NamedTuple):
    """The tokens of a chunk, (n_tokens,), and which of them the model learns: bool (n_tokens,); None: all."""

    ids: np.ndarray
    is_target: np.ndarray | None
    n_bytes: int  # of the text, before normalization
    unwritten: tuple[str, ...] = ()  # kinds of parts that the template left out


def encode_dialogue(dialogue: Dialogue, tokenizer: Any) -> EncodedText:
    """Return the tokens of a dialogue, with those that begin and end it.

    `tokenizer` is a `training.data.Tokenizer`. Prompt and completion are encoded apart, as in generation, between
    end-of-text tokens, of which the last is a target.
    """
    if dialogue.prompt is None:
        pieces = tokenizer.dialogue_template.pieces(dialogue.messages, dialogue.where, dialogue.tools)
        return encode_pieces(pieces, tokenizer)._replace(unwritten=tuple(unwritten(dialogue, pieces)))
    pieces = [
        Piece(tokenizer.separator, is_special=True),
        Piece(dialogue.prompt),
        Piece(dialogue.messages[0]["content"], is_target=True),
        Piece(tokenizer.separator, is_target=True, is_special=True),
    ]
    return encode_pieces(pieces, tokenizer)


def unwritten(dialogue: Dialogue, pieces: Sequence[Piece]) -> Iterator[str]:
    """Yield the kind of each message, tool call and list of tools that is not in the text a template wrote."""
    text = "".join(piece.text for piece in pieces)
    if dialogue.tools and not any(name in text for name in names_of(dialogue.tools)):
        yield "lists of tools"
    for message in dialogue.messages:
        if message["content"].strip() not in text:
            yield f"turns of role {message['role']}"
        calls = message.get("tool_calls") or ()
        if calls and not any(name in text for name in names_of(calls)):
            yield "turns with tool_calls"


def names_of(tools: Any) -> list[str]:
    """Return the names of functions in a list of tools, or of calls of them."""
    functions = (tool.get("function", tool) for tool in tools if isinstance(tool, Mapping))
    return [str(function["name"]) for function in functions if isinstance(function, Mapping) and "name" in function]


def encode_turn(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of messages up to where the assistant's next message begins."""
    return encode_pieces(tokenizer.dialogue_template.prompt(messages), tokenizer).ids.tolist()


def encode_user_turn(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a dialogue's first turn, as a prompt for the assistant's answer."""
    return encode_turn(tokenizer, [{"role": "user", "content": text}])


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens besides the end-of-text token that end the assistant's turn.

    Raises UserError if there is no chat template, or if it ends the turn without a special token.
    """
    token = tokenizer.inner.token_to_id(tokenizer.dialogue_template.end_of_turn)
    return [] if token == tokenizer.end_of_text else [token]


def encode_pieces(pieces: list[Piece], tokenizer: Any) -> EncodedText:
    """Return the tokens of pieces one after another, in the tokenizer's dtype. A special piece is one token."""
    texts = [piece.text for piece in pieces if not piece.is_special]
    ordinary = iter(tokenizer.encode_batch(texts))
    ids = [
        np.array([tokenizer.inner.token_to_id(piece.text)], tokenizer.dtype) if piece.is_special else next(ordinary)
        for piece in pieces
    ]
    is_target = np.repeat([piece.is_target for piece in pieces], [len(tokens) for tokens in ids])
    return EncodedText(np.concatenate(ids), is_target, sum(len(text.encode()) for text in texts))
