"""Faster encoders with the same tokens: byte-level BPE by tiktoken's engine, and bytes by a table.

`tokenizers` merges the pairs in its list of merges, first pair first. tiktoken joins any two neighbors that form a
token, lowest rank first; here ranks follow the merges. Both give the same tokens if (1) each token has exactly one pair
and (2) each token's own text is encoded as that token. By (2), two neighbors that form a token but are not its pair
never occur: their text alone would be encoded as these two. `build_fast_encoder` checks (1) and (2).
"""

import json
from collections.abc import Callable

import numpy as np
import tiktoken
import tokenizers

# GPT-2's pattern as tiktoken writes it: possessive, so that the engine does not backtrack.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
SWITCHES = ("dropout", "ignore_merges", "byte_fallback")

Encoder = Callable[[str], np.ndarray]  # text to token ids


def unicode_to_bytes() -> dict[str, int]:
    """Return the byte that each character of a token stands for (the inverse of GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {shifted.get(byte, chr(byte)): byte for byte in range(256)}


BYTE_OF = unicode_to_bytes()


def build_fast_encoder(inner: tokenizers.Tokenizer) -> Encoder | None:
    """Return an encoder that gives the tokens of `inner`, and no special tokens; None if the engine would differ."""
    spec = json.loads(inner.to_str())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    is_plain = (  # byte-level BPE with GPT-2's pattern and nothing else
        model["type"] == "BPE"
        and not any(model.get(name) for name in AFFIXES + SWITCHES)
        and spec["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
        and all(token["special"] for token in spec["added_tokens"])
    )
    if not is_plain or not BYTE_OF.keys() <= model["vocab"].keys():
        return None
    ids = [model["vocab"][letter] for letter in BYTE_OF]  # in the order of bytes
    if not model["merges"]:
        id_of_byte = np.array(ids)
        return lambda text: id_of_byte[np.frombuffer(text.encode(), np.uint8)]
    merged = [left + right for left, right in model["merges"]]
    if len({*BYTE_OF, *merged}) < len(BYTE_OF) + len(merged):
        return None
    if any([token.value for token in inner.model.tokenize(text)] != [text] for text in merged):
        return None
    ranks = {bytes(BYTE_OF[letter] for letter in token): rank for rank, token in enumerate([*BYTE_OF, *merged])}
    id_of_rank = np.array(ids + [model["vocab"][token] for token in merged])
    encoding = tiktoken.Encoding("fast", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: id_of_rank[encoding.encode_to_numpy(text)]
