"""Check that a tokenizer is byte-level and loses no text: by the types of its parts, and by trying every added token.

A fixed text cannot show what a part does to other text, so a part of a type that is not listed here is refused.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from training.data.tiktoken_encode import AFFIXES, BYTE_OF

PROBE = "Def F(x):\r\n\treturn  x  # naïve 日本語 🙂 1234567 don't <|endoftext|>\n\n\n"
EQUIVALENT = {"NFC", "NFD"}  # normalizers that only change how a character is written in bytes
SPLITTERS = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength"}  # pre-tokenizers


def token_sizes(inner: tokenizers.Tokenizer) -> np.ndarray:
    """Return the bytes of text in each token, int32 (largest id + 1,); 0 for special tokens."""
    vocab = inner.get_vocab()
    n_bytes = np.zeros(max(vocab.values()) + 1, np.int32)
    for token, i in vocab.items():
        n_bytes[i] = len(token)  # a character of a byte-level token stands for one byte
    for i, added in inner.get_added_tokens_decoder().items():
        n_bytes[i] = 0 if added.special else len(added.content.encode())
    return n_bytes


def parts_of(component: Any) -> Iterator[dict]:
    """Yield the options of a normalizer, pre-tokenizer or decoder; of a sequence those of each entry."""

    parts = [] if component is None else [json.loads(component.__getstate__())]
    while parts:
        part = parts.pop(0)
        if part["type"] == "Sequence":
            parts[:0] = next(entries for entries in part.values() if isinstance(entries, list))
        else:
            yield part


def normalization(inner: tokenizers.Tokenizer) -> str | None:
    """Return the normalization that changes the bytes of text before it is tokenized, such as "NFC"; None: none."""
    return " and ".join(part["type"] for part in parts_of(inner.normalizer)) or None


def reason_lossy(inner: tokenizers.Tokenizer, n_bytes: np.ndarray) -> str | None:
    """Return why decoded text is not the text, up to its normalization, or `n_bytes` of the tokens not its bytes."""
    for part in parts_of(inner.normalizer):
        if part["type"] not in EQUIVALENT:
            return f"its normalizer {part['type']} changes text"
    splitters = list(parts_of(inner.pre_tokenizer))
    for part in splitters:
        if part["type"] not in SPLITTERS or part.get("behavior") == "Removed":
            return f"its pre-tokenizer {part['type']} drops or replaces characters"
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            return "it puts a space before the text (add_prefix_space)"
    decoders = {part["type"] for part in parts_of(inner.decoder)}
    if not any(part["type"] == "ByteLevel" for part in splitters) or decoders != {"ByteLevel"}:
        return "its tokens are not made of bytes (ByteLevel)"
    if not isinstance(inner.model, tokenizers.models.BPE):
        return f"its model is {type(inner.model).__name__}, not BPE"
    if affixes := [name for name in AFFIXES[:2] if getattr(inner.model, name)]:
        return f"its tokens have an affix ({affixes[0]})"
    if missing := sorted(byte for letter, byte in BYTE_OF.items() if inner.model.token_to_id(letter) is None):
        return f"it has no token for byte {missing[0]:#04x}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
    return _reason_of_added_tokens(inner, n_bytes)


def _reason_of_added_tokens(inner: tokenizers.Tokenizer, n_bytes: np.ndarray) -> str | None:
    """Try every added token, alone and between white space, which options such as `lstrip` swallow."""
    contents = []
    for i, added in inner.get_added_tokens_decoder().items():
        contents.append(added.content)
        if (decoded := inner.decode([i], skip_special_tokens=False)) != added.content:
            return f"its added token {added.content!r} comes back as {decoded!r}"
    for text in (PROBE, *(f"x \t{content}  \n{content}y" for content in contents)):
        ids = inner.encode(text, add_special_tokens=False).ids
        normalized = text if inner.normalizer is None else inner.normalizer.normalize_str(text)
        if (decoded := inner.decode(ids, skip_special_tokens=False)) != normalized:
            return f"{text!r} comes back as {decoded!r}"
        if n_bytes[ids].sum() != len(normalized.encode()):
            return f"the tokens of {text!r} do not add up to its bytes"
    return None
