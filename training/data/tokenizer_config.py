"""Reads the files beside a tokenizer: its end-of-text token, its first token, and its chat template."""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from training.data.chat_template import read_template
from training.errors import UserError
from training.files import read_bytes

END_OF_TEXT = "<|endoftext|>"
# End-of-text tokens of common tokenizers, for a tokenizer.json without a file that names its own.
OTHER_SEPARATORS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")  # noqa: RUF001
NAME = re.compile(r"<.+>|\[.+\]")  # of a special token that is in the vocabulary


def own_separator(folder: Path, inner: tokenizers.Tokenizer) -> str:
    """Return the end-of-text token that the files of a model name, the first of several; GPT-2's if they name none.

    Raises UserError for a file that cannot be read.
    """
    added = inner.get_added_tokens_decoder()
    names = []
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        fields = read_fields(folder / file)
        ids = fields.get("eos_token_id")
        id_ = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(id_, int) and 0 <= id_ < 2**31:
            names.append(inner.id_to_token(id_))
        name = fields.get("eos_token")
        names.append(name.get("content") if isinstance(name, dict) else name)
    known = {token.content for token in added.values()} | {name for name in names if NAME.fullmatch(str(name))}
    if inner.token_to_id(END_OF_TEXT) is None:
        names += OTHER_SEPARATORS
    return next((name for name in names if name in known and inner.token_to_id(name) is not None), END_OF_TEXT)


def own_chat_template(folder: Path) -> str | None:
    """Return the chat template in the files of a tokenizer, if there is one. Raises UserError if it cannot be read."""
    if (path := folder / "chat_template.jinja").is_file():
        return read_template(path)
    template = read_fields(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several with names
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def own_bos_token(folder: Path) -> str | None:
    """Return the token that the files of a tokenizer name as the beginning of a text. Raises UserError as above."""
    name = read_fields(folder / "tokenizer_config.json").get("bos_token")
    return name.get("content") if isinstance(name, dict) else name


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON object; {} if there is no such file. Raises UserError if it cannot be read."""
    try:
        fields = json.loads(read_bytes(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); it would name the tokenizer's end-of-text token") from None
    return fields if isinstance(fields, dict) else {}
