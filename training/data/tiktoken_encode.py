"""The same tokens, sooner: byte-level BPE by tiktoken's engine, and bytes by a table.

`tokenizers` applies the pairs in its list of merges, best first; tiktoken joins any two neighbours that make up a
token, best token first. These are the same where every token has one pair, in the order of the tokens, and every
token's own text is encoded as that token: then two neighbours that make up a token but are not its pair do not come
about, for their text alone would have ended as these two. All of that is looked at, never assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

from training.data.byte_unicode import unicode_to_bytes

# GPT-2's, as tiktoken writes it: possessive, so that nothing is tried twice.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

BYTE_OF = unicode_to_bytes()
OTHERWISE = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "ignore_merges",
    "byte_fallback",
    "unk_token",
)

Encoder = Callable[[str], np.ndarray]  # a text to its tokens


def build_fast_encoder(inner: tokenizers.Tokenizer) -> Encoder | None:
    """What encodes as `inner` does, special tokens' texts as any other; None where it is of another kind."""
    described = json.loads(inner.to_str())
    model = described["model"]
    if not _plain(described) or not BYTE_OF.keys() <= model["vocab"].keys():
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
    return _by_tiktoken([*BYTE_OF, *merged], np.array(ids + [model["vocab"][text] for text in merged]))


def _plain(described: dict[str, Any]) -> bool:
    """Whether it is byte-level BPE with GPT-2's pattern and nothing besides."""
    model, words = described["model"], described["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in OTHERWISE)
        and described["normalizer"] is None
        and words.get("type") == "ByteLevel"
        and words["use_regex"]
        and not words["add_prefix_space"]
        and all(added["special"] for added in described["added_tokens"])
    )


def _by_tiktoken(tokens: list[str], id_of_rank: np.ndarray) -> Encoder:
    import tiktoken

    ranks = {bytes(BYTE_OF[letter] for letter in token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("fast", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: id_of_rank[encoding.encode_to_numpy(text)]
