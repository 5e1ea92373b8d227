"""Text to tokens and back. The end-of-text token stands between documents and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from training.data.byte_unicode import unicode_to_bytes
from training.data.tiktoken_encode import Encoder, build_fast_encoder
from training.errors import UserError
from training.files import mkdir_durable, write_atomically

END_OF_TEXT = "<|endoftext|>"
PROBE = "Def F(x):\r\n\treturn  x  # naïve 日本語 🙂 1234567 don't <|endoftext|>\n\n\n"


class Tokenizer:
    """A lossless byte-level tokenizer: a `tokenizers.Tokenizer` with an end-of-text token.

    `<|endoftext|>` within text is encoded as ordinary characters. A tokenizer without that token gets it as an
    additional last one. Raises UserError if text does not survive a round trip or the tokens do not add up to its
    bytes, as with WordPiece or SentencePiece.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str):
        self.inner = inner
        inner.no_padding()
        inner.no_truncation()
        inner.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        inner.encode_special_tokens = True
        self.end_of_text: int = inner.token_to_id(END_OF_TEXT)
        self.vocab_size: int = max(inner.get_vocab().values()) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        ids = self.encode(PROBE)
        if self.decode(ids) != PROBE or self.token_bytes[ids].sum() != len(PROBE.encode()):
            raise UserError(f"{name}: not a lossless byte-level tokenizer; use one such as GPT-2's")

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 (n_tokens,), without an end-of-text token."""
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, in `dtype`, faster than `encode`."""
        if self._fast_encoder is not None:
            return [self._fast_encoder(text).astype(self.dtype, copy=False) for text in texts]
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    @cached_property
    def _fast_encoder(self) -> Encoder | None:
        return build_fast_encoder(self.inner)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, with end-of-text tokens written out and U+FFFD for bytes that are not UTF-8."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text in each token, int32 (vocab_size,); 0 for special tokens."""
        n_bytes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.inner.get_vocab().items():
            n_bytes[i] = len(token)  # a character of a byte-level token stands for one byte
        for i, added in self.inner.get_added_tokens_decoder().items():
            n_bytes[i] = 0 if added.special else len(added.content.encode())
        return n_bytes

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Transformers' `AutoTokenizer` opens."""
        folder = Path(folder)
        mkdir_durable(folder)
        # Not `inner.save`, which raises a bare Exception if the disk is full.
        write_atomically(folder / "tokenizer.json", self.inner.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # Transformers 4 would add token_type_ids
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        }
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load the tokenizer.json of a folder."""
        return from_json(Path(folder) / "tokenizer.json")


def from_json(path: Path) -> Tokenizer:
    """Load a tokenizer.json. Raises UserError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({error})") from None
    return Tokenizer(inner, str(path))


def from_vocab_and_merges(vocab: Path, merges: Path) -> Tokenizer:
    """Load a tokenizer from GPT-2's two files. Raises UserError if they cannot be read."""
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{vocab}, {merges.name}: not a BPE's vocabulary and merges ({error})") from None
    return Tokenizer(_byte_level(model), str(vocab.parent))


def build_byte_tokenizer() -> Tokenizer:
    """Build the tokenizer whose token i is byte i and whose token 256 is the end of text."""
    return Tokenizer(_byte_level(models.BPE(vocab=unicode_to_bytes(), merges=[])), "byte")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer. The same texts give the same tokenizer.

    `vocab_size` includes the end-of-text token, which is the last. Little text gives fewer tokens.
    """
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, "bpe")


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
