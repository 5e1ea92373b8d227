"""Builds the tokenizer of `data.tokenizer`: trained here, from disk, from the hub, or tiktoken's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from training.config import BPETokenizer, ByteTokenizer, FileTokenizer, HuggingFaceTokenizer, Section, TiktokenTokenizer
from training.data.byte_unicode import unicode_to_bytes
from training.data.file_hashes import FileHashes
from training.data.tokenizer import (
    END_OF_TEXT,
    PROBE,
    Tokenizer,
    build_byte_tokenizer,
    from_json,
    from_vocab_and_merges,
    train_bpe,
)
from training.errors import UserError, library_error

if TYPE_CHECKING:
    import tiktoken

FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def _bpe(config: BPETokenizer, texts: Iterable[str]) -> Tokenizer:
    return train_bpe(_up_to(texts, config.max_bytes), config.vocab_size)


def _up_to(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yield texts until they have `max_bytes` in all."""
    for text in texts:
        yield text
        max_bytes -= len(text.encode())
        if max_bytes <= 0:
            return


def _file(config: FileTokenizer, _texts: Iterable[str]) -> Tokenizer:
    files = tokenizer_files(config)
    return from_json(*files) if len(files) == 1 else from_vocab_and_merges(*files)


def tokenizer_files(config: FileTokenizer) -> list[Path]:
    """Return the tokenizer.json, or vocab.json and merges.txt. Raises UserError if there is neither."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path]
    for names in FILES:
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    raise UserError(f"{path}: no tokenizer.json here, and no vocab.json with merges.txt")


def _huggingface(config: HuggingFaceTokenizer, _texts: Iterable[str]) -> Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_pretrained(config.name)
    except Exception as error:
        where = f"tokenizer {config.name!r} from the Hugging Face hub"
        raise UserError(f"{where} cannot be loaded: {library_error(error)}") from None
    return Tokenizer(inner, config.name)


def _tiktoken(config: TiktokenTokenizer, _texts: Iterable[str]) -> Tokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(config.name)
    except Exception as error:  # the network's errors, and ValueError for an unknown name
        raise UserError(f"tiktoken encoding {config.name!r} cannot be loaded: {library_error(error)}") from None
    return from_tiktoken(encoding)


def from_tiktoken(encoding: tiktoken.Encoding) -> Tokenizer:
    """Convert an encoding to a `tokenizers.Tokenizer`. Raises UserError if it would not give the same tokens.

    tiktoken stores ranks instead of merges: a token's merges are the pairs of tokens that make it up, best ranks
    first (as in Transformers' TikTokenConverter). Its patterns use possessive quantifiers and `$` for the end of the
    text, which the regular expressions of `tokenizers` write differently.
    """
    letters = {byte: letter for letter, byte in unicode_to_bytes().items()}
    ranks = encoding._mergeable_ranks
    vocab = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    if END_OF_TEXT in encoding.special_tokens_set:
        vocab[END_OF_TEXT] = encoding.eot_token
    pairs = [
        (ranks[token], ranks[token[:i]], ranks[token[i:]], token[:i], token[i:])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    merges = [
        ("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for *_, left, right in sorted(pairs)
    ]
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = re.sub(r"([?*+}])\+", r"\1", encoding._pat_str).replace("$", r"\z")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(inner, encoding.name)
    if tokenizer.encode(PROBE).tolist() != encoding.encode_ordinary(PROBE):
        raise UserError(f"tiktoken encoding {encoding.name!r} cannot be converted: it gives other tokens")
    return tokenizer


TOKENIZERS: dict[type[Section], Callable[[Any, Iterable[str]], Tokenizer]] = {
    BPETokenizer: _bpe,
    ByteTokenizer: lambda _config, _texts: build_byte_tokenizer(),
    FileTokenizer: _file,
    HuggingFaceTokenizer: _huggingface,
    TiktokenTokenizer: _tiktoken,
}


def build_tokenizer(config: Section, texts: Iterable[str]) -> Tokenizer:
    """Build the tokenizer of a config. A tokenizer that is trained here learns from the start of `texts`."""
    return TOKENIZERS[type(config)](config, texts)


def tokenizer_identity(config: Section, hashes: FileHashes) -> Any:
    """Return JSON-able facts that decide the tokenizer, beside the texts: its options, or its files' hashes."""
    if isinstance(config, FileTokenizer):
        return ["file", [hashes.sha256(path) for path in tokenizer_files(config)]]
    return config.model_dump()
