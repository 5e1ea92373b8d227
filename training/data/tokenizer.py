"""Text to tokens and back, with tokenizers trained here, from disk, from the Hugging Face hub, or tiktoken's.

The end-of-text token stands between documents and nowhere else. A model's own tokenizer keeps the model's own.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from training.config import BPETokenizer, ByteTokenizer, FileTokenizer, HuggingFaceTokenizer, Section, TiktokenTokenizer
from training.data.chat_template import ChatTemplate
from training.data.file_hashes import FileHashes
from training.data.lossless import PROBE, normalization, reason_lossy, token_sizes
from training.data.progress import run_interruptibly
from training.data.tiktoken_encode import Encoder, build_fast_encoder, unicode_to_bytes
from training.data.tokenizer_config import END_OF_TEXT, own_bos_token, own_chat_template, own_separator
from training.errors import UserError, library_error
from training.files import mkdir_durable, read_bytes, write_atomically

MAX_VOCAB_SIZE = 2**24  # arrays of this length are made; the largest known vocabularies have 2**20 tokens
MAX_WORD_CHARS = 256  # learning from a word takes time in proportion to the square of its length
LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_WORD_CHARS + 1},}}|(?<!\s)\s{{{MAX_WORD_CHARS + 1},}}")


class Tokenizer:
    """A lossless byte-level tokenizer: a `tokenizers.Tokenizer` with an end-of-text token, added last if it lacks one.

    `separator` is that token's name; within text it is encoded as ordinary characters. `normalization` may change how
    characters are written in bytes. `token_bytes` are the bytes of text in each token, 0 for special ones. Raises
    UserError if text does not survive a round trip otherwise, or the tokens do not add up to its bytes, as with
    WordPiece or SentencePiece.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str, separator: str = END_OF_TEXT):
        self.inner, self.separator = inner, separator
        inner.no_padding()
        inner.no_truncation()
        inner.add_special_tokens([AddedToken(separator, normalized=False)])
        inner.encode_special_tokens = True
        if (largest := max(inner.get_vocab().values())) >= MAX_VOCAB_SIZE:
            raise UserError(f"{name}: token id {largest} is not below {MAX_VOCAB_SIZE}, the limit")
        self.token_bytes = token_sizes(inner)
        if reason := reason_lossy(inner, self.token_bytes):
            raise UserError(f"{name}: not a lossless byte-level tokenizer: {reason}; use one such as GPT-2's")
        inner.model.dropout = None  # merges left out at random would make other tokens each time
        self.normalization = normalization(inner)
        self.end_of_text: int = inner.token_to_id(separator)
        self.chat_template: str | None = None  # the source of a Jinja template
        self.bos_token = separator  # the name of the token that a chat template begins with, if it asks for one
        self.vocab_size = len(self.token_bytes)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def separators(self) -> tuple[str, ...]:
        """Names that are borders between documents in a dump: the tokenizer's own and GPT-2's."""
        return tuple(dict.fromkeys((self.separator, END_OF_TEXT)))

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 (n_tokens,), without an end-of-text token."""
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, in `dtype`, faster than `encode`.

        Raises UserError if one of them is the end-of-text token.
        """
        if self._fast_encoder is not None:
            tokens = [self._fast_encoder(text).astype(self.dtype, copy=False) for text in texts]
        else:
            encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
            tokens = [np.array(encoding.ids, self.dtype) for encoding in encodings]
        if any((ids == self.end_of_text).any() for ids in tokens):
            raise UserError("data.tokenizer: it gave an end-of-text token for ordinary text, so it cannot be used")
        return tokens

    @cached_property
    def _fast_encoder(self) -> Encoder | None:
        return build_fast_encoder(self.inner)

    @cached_property
    def dialogue_template(self) -> ChatTemplate:
        """The chat template with this tokenizer's special tokens. Raises UserError if there is none."""
        if self.chat_template is None:
            raise UserError("no chat template: the model was not trained on dialogues (data.sources: messages_column)")
        special = [token.content for token in self.inner.get_added_tokens_decoder().values() if token.special]
        return ChatTemplate(self.chat_template, "the chat template", special, self.bos_token, self.separator)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, with end-of-text tokens written out and U+FFFD for bytes that are not UTF-8."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path, n_positions: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Transformers' `AutoTokenizer` opens.

        There, `truncation=True` cuts a text to `n_positions` tokens (None: not), and a batch is padded on the left, as
        generation needs it.
        """
        mkdir_durable(folder := Path(folder))
        # Not `inner.save`, which raises a bare Exception if the disk is full.
        write_atomically(folder / "tokenizer.json", self.inner.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # Transformers 4 would add token_type_ids
            "clean_up_tokenization_spaces": False,
            "model_max_length": n_positions,
            "padding_side": "left",
            "bos_token": self.bos_token,
            **dict.fromkeys(("eos_token", "unk_token", "pad_token"), self.separator),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Load the tokenizer.json of a folder, and what a chat needs from the files beside it."""
        tokenizer = from_json(Path(folder) / "tokenizer.json")
        tokenizer.read_chat_files(Path(folder))
        return tokenizer

    def read_chat_files(self, folder: Path) -> None:
        """Set the chat template and the token that it begins with as the files of a folder name them."""
        self.chat_template = own_chat_template(folder)
        bos_token = own_bos_token(folder)
        if any(token.content == bos_token for token in self.inner.get_added_tokens_decoder().values()):
            self.bos_token = bos_token


def from_json(path: Path, separator: str | None = None) -> Tokenizer:
    """Load a tokenizer.json; `separator` None: as the files beside it say. Raises UserError if it cannot be read."""
    try:
        text = read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({error})") from None
    return Tokenizer(inner, str(path), separator or own_separator(path.parent, inner))


def from_vocab_and_merges(vocab: Path, merges: Path) -> Tokenizer:
    """Load a tokenizer from GPT-2's two files. Raises UserError if they cannot be read."""
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{vocab}, {merges.name}: not a BPE's vocabulary and merges ({error})") from None
    inner = _byte_level(model)
    return Tokenizer(inner, str(vocab.parent), own_separator(vocab.parent, inner))


def build_byte_tokenizer() -> Tokenizer:
    """Build the tokenizer whose token i is byte i and whose token 256 is the end of text."""
    return Tokenizer(_byte_level(models.BPE(vocab=unicode_to_bytes(), merges=[])), "byte")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer. The same texts give the same tokenizer.

    `vocab_size` includes the end-of-text token, which is the last. Little text gives fewer tokens. Words longer than
    MAX_WORD_CHARS are cut for training, and only for it. An exception such as KeyboardInterrupt ends the reading.
    """
    inner, is_running = _byte_level(models.BPE()), True

    def words() -> Iterator[str]:
        for text in texts:
            for part in cut_long_words(text):
                if not is_running:
                    return
                yield part

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    try:
        run_interruptibly(lambda: inner.train_from_iterator(words(), trainer))
    finally:
        is_running = False
    return Tokenizer(inner, "bpe")


def cut_long_words(text: str) -> Iterator[str]:
    """Yield the text in parts, cut only inside words of GPT-2's pre-tokenizer longer than MAX_WORD_CHARS."""
    start, splitter = 0, pre_tokenizers.ByteLevel(add_prefix_space=False)
    for run in LONG_RUN.finditer(text):
        for _, (first, end) in splitter.pre_tokenize_str(run.group()):
            for cut in range(run.start() + first + MAX_WORD_CHARS, run.start() + end, MAX_WORD_CHARS):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def up_to(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yield texts until they have `max_bytes` in all; then close a generator, and so its files."""
    for text in texts:
        yield text
        max_bytes -= len(text.encode())
        if max_bytes <= 0:
            break
    if isinstance(texts, Generator):
        texts.close()


def _file(config: FileTokenizer, _texts: Iterable[str]) -> Tokenizer:
    return from_files(Path(config.path))


def from_files(path: Path) -> Tokenizer:
    """Load a tokenizer from a file or folder. Raises UserError if there is none."""
    files = tokenizer_files(path)
    tokenizer = from_json(*files) if len(files) == 1 else from_vocab_and_merges(*files)
    tokenizer.read_chat_files(files[0].parent)
    return tokenizer


def tokenizer_files(path: Path) -> list[Path]:
    """Return the tokenizer.json, or vocab.json and merges.txt. Raises UserError if there is neither."""
    if path.is_file():
        return [path]
    for files in ([path / "tokenizer.json"], [path / "vocab.json", path / "merges.txt"]):
        if all(file.is_file() for file in files):
            return files
    raise UserError(f"{path}: no tokenizer.json here, and no vocab.json with merges.txt")


def _huggingface(config: HuggingFaceTokenizer, _texts: Iterable[str]) -> Tokenizer:
    from huggingface_hub import snapshot_download

    if Path(config.name).is_dir():
        raise UserError(
            f"data.tokenizer: {config.name} is a folder; for its tokenizer write {{type: file, path: {config.name}}}"
        )
    try:
        folder = snapshot_download(config.name, allow_patterns=["*.json", "merges.txt"])
    except Exception as error:
        reason = library_error(error)
        raise UserError(f"tokenizer {config.name!r} from the Hugging Face hub cannot be loaded: {reason}") from None
    return from_files(Path(folder))


def _tiktoken(config: TiktokenTokenizer, _texts: Iterable[str]) -> Tokenizer:
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
    text_of = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {text_of[token]: rank for token, rank in ranks.items()}
    if END_OF_TEXT in encoding.special_tokens_set:
        vocab[END_OF_TEXT] = encoding.eot_token
    pairs = sorted(
        (ranks[token], ranks[token[:i]], ranks[token[i:]], text_of[token[:i]], text_of[token[i:]])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    )
    merges = [(left, right) for *_, left, right in pairs]
    inner = _byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = re.sub(r"([?*+}])\+", r"\1", encoding._pat_str).replace("$", r"\z")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = Tokenizer(inner, encoding.name)
    if tokenizer.encode(PROBE).tolist() != encoding.encode_ordinary(PROBE):
        raise UserError(f"tiktoken encoding {encoding.name!r} cannot be converted: it gives other tokens")
    return tokenizer


TOKENIZERS: dict[type[Section], Callable[[Any, Iterable[str]], Tokenizer]] = {
    BPETokenizer: lambda config, texts: train_bpe(up_to(texts, config.max_bytes), config.vocab_size),
    ByteTokenizer: lambda _config, _texts: build_byte_tokenizer(),
    FileTokenizer: _file,
    HuggingFaceTokenizer: _huggingface,
    TiktokenTokenizer: _tiktoken,
}


def build_tokenizer(config: Section, texts: Iterable[str]) -> Tokenizer:
    """Build the tokenizer of a config. `bpe` trains on the start of `texts`; the others ignore them."""
    return TOKENIZERS[type(config)](config, texts)


def tokenizer_identity(config: Section, hashes: FileHashes) -> Any:
    """Return JSON-able values that identify the tokenizer, apart from its texts: its options, or its files' hashes."""
    if isinstance(config, FileTokenizer):
        path = Path(config.path)
        sha256, separator = [hashes.sha256(file) for file in tokenizer_files(path)], from_files(path).separator
        return ["file", sha256] + [separator] * (separator != END_OF_TEXT)
    return config.model_dump()
