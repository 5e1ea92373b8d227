"""Writing a stream of tokens to the files of `shards.py`."""

import hashlib
from collections import Counter
from typing import BinaryIO

import numpy as np

from training.data.chunks import Chunk
from training.data.dialogues import EncodedText
from training.data.shards import PartRecord, StreamRecord, TextSize
from training.data.tokenizer import Tokenizer


class StreamWriter:
    """Writes the documents of one stream to binary files: tokens, where each document starts, and what is learned."""

    def __init__(self, tokenizer: Tokenizer, tokens: BinaryIO, documents: BinaryIO, targets: BinaryIO | None = None):
        self.tokenizer, self.tokens, self.documents, self.targets = tokenizer, tokens, documents, targets
        self.n_documents = self.n_tokens = self.n_targets = 0
        self.targets_sha256, self.with_answers = hashlib.sha256(), set()
        self.parts: dict[int, Counter[str]] = {}  # by source: the counts of TextSize
        self.sha256, self.document = hashlib.sha256(), hashlib.blake2b(digest_size=8)
        self.earlier_documents = bytearray()  # 8 bytes for each

    def add(self, chunk: Chunk, text: EncodedText) -> None:
        """Write the tokens of a chunk. An end-of-text token comes before each document; sources come one by one."""
        ids, part = text.ids, self.parts.setdefault(chunk.source, Counter())
        part["n_bytes"] += text.n_bytes
        part["token_bytes"] += int(self.tokenizer.token_bytes[ids].sum())
        if chunk.starts_document:
            self.documents.write(np.array([self.n_tokens], "<u8").tobytes())
            if self.n_documents:
                self.earlier_documents += self.document.digest()
            self.document = hashlib.blake2b(digest_size=8)
            self.n_documents += 1
            part["n_documents"] += 1
            if chunk.dialogue is None:
                ids = np.append(self.tokenizer.end_of_text, ids)
        if self.targets is not None:
            self._add_targets(chunk, np.ones(len(ids), bool) if text.is_target is None else text.is_target)
        data = ids.astype(self.tokenizer.dtype).tobytes()
        self.tokens.write(data)
        self.sha256.update(data)
        self.document.update(data)
        self.n_tokens += len(ids)
        part["n_tokens"] += len(ids)

    def _add_targets(self, chunk: Chunk, is_target: np.ndarray) -> None:
        """Write which tokens of a chunk are learned."""
        if chunk.dialogue is not None:
            self.with_answers.add(chunk.source)
        self.targets.write(is_target.tobytes())
        self.targets_sha256.update(is_target.tobytes())
        self.n_targets += int(is_target.sum())

    def document_hashes(self) -> np.ndarray:
        """Return a hash of each document, uint64 (n_documents,)."""
        return np.frombuffer(self.earlier_documents + self.document.digest(), np.uint64)[: self.n_documents]

    def record(self, split: str) -> StreamRecord:
        """Return the stream's record for the manifest."""
        parts = [
            PartRecord(source=source, has_answers=source in self.with_answers, **self._size(counts))
            for source, counts in self.parts.items()
        ]
        total = self._size(sum(self.parts.values(), Counter()))
        targets = {}
        if self.targets is not None:
            targets = {"targets_sha256": self.targets_sha256.hexdigest(), "n_targets": self.n_targets}
        return StreamRecord(split=split, sha256=self.sha256.hexdigest(), parts=parts, **targets, **total)

    def _size(self, counts: Counter[str]) -> dict[str, int | None]:
        """Return the fields of a `TextSize`."""
        same = {"token_bytes": None} if self.tokenizer.normalization is None else {}
        return {name: counts[name] for name in TextSize.model_fields} | same
