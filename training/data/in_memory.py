"""Files read into memory as a split, without a cache: to evaluate on a text, not to train on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.config import FilesSource
from training.data.corpus import split_documents
from training.data.shards import Split, Stream
from training.data.sources import build_reader
from training.data.tokenizer import Tokenizer
from training.errors import UserError


def read_split(paths: Sequence[str], text_column: str, tokenizer: Tokenizer) -> Split:
    """Tokenize all documents of the files as one stream. Raises UserError if they cannot be read or hold no text."""
    arrays, starts, n_tokens, n_bytes = [], [], 0, 0
    reader = build_reader(FilesSource(paths=tuple(paths), text_column=text_column))
    for chunk in split_documents(reader, 0, 1.0):
        if chunk.starts_document and not chunk.text.strip():
            continue
        ids = tokenizer.encode(chunk.text)
        if chunk.starts_document:
            starts.append(n_tokens)
            ids = np.concatenate([[tokenizer.end_of_text], ids])
        arrays.append(ids.astype(tokenizer.dtype))
        n_tokens += len(ids)
        n_bytes += len(chunk.text.encode())
    if not starts:
        raise UserError(f"{', '.join(paths)}: no text in there")
    stream = Stream(Path(paths[0]), np.concatenate(arrays), np.array(starts, np.uint64))
    return Split("val", (stream,), None, tokenizer.vocab_size, len(starts), n_tokens, n_bytes)
