"""Text to tokens and back, with every kind of tokenizer."""

import hashlib
import json
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from training import config
from training.data import tokenizer as tokenizer_module
from training.data.file_hashes import FileHashes
from training.data.lossless import PROBE
from training.data.tiktoken_encode import build_fast_encoder, unicode_to_bytes
from training.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZERS,
    Tokenizer,
    build_byte_tokenizer,
    build_tokenizer,
    from_tiktoken,
    from_vocab_and_merges,
    tokenizer_identity,
    train_bpe,
)
from training.errors import UserError

GPT2 = Path(__file__).parents[2] / "shared" / "tokenizers" / "gpt2"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="needs ../shared/tokenizers/gpt2")
TEXT = Path(tokenizer_module.__file__).read_text()
BPE = train_bpe([TEXT] * 3, 400)

# cl100k_base's pattern (tiktoken_ext/openai_public.py), the hardest to convert.
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


def test_every_tokenizer_config_has_a_builder():
    assert {get_args(tagged)[0] for tagged in get_args(get_args(config.TokenizerConfig)[0])} == set(TOKENIZERS)


@pytest.mark.parametrize("tokenizer", [build_byte_tokenizer(), BPE], ids=["byte", "bpe"])
@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_text_survives_a_round_trip_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert [each.tolist() for each in tokenizer.encode_batch([text, "a"])] == [ids.tolist(), [*tokenizer.encode("a")]]


def check_same_tokens(tokenizer: Tokenizer, text: str) -> None:
    expected = tokenizer.inner.encode(text, add_special_tokens=False).ids
    assert build_fast_encoder(tokenizer.inner)(text).tolist() == expected


@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\t  'sStTlL0123ééß日本🙂")))
@settings(max_examples=300, deadline=None)
def test_the_fast_encoder_gives_the_same_tokens(text):
    for tokenizer in (BPE, build_byte_tokenizer()):
        check_same_tokens(tokenizer, text)


def test_the_fast_encoder_splits_around_every_character_like_the_tokenizer():
    points = [chr(point) for point in [*range(0xD800), *range(0xE000, 0x18000), *range(0x1D000, 0x20000)]]
    check_same_tokens(BPE, "".join(f"a{c}{c}1 {c} \n" for c in points))


@needs_gpt2
def test_the_fast_encoder_gives_gpt2s_tokens():
    tokenizer = from_vocab_and_merges(GPT2 / "vocab.json", GPT2 / "merges.txt")
    words = ["naïve", "日本語", "🙂🙂", "1234567", "don't", "I'LL", "_x__", "...,", "\t\n\n", "", "\r\n", END_OF_TEXT]
    check_same_tokens(tokenizer, Path(subprocess.__file__).read_text() + " ".join(words) + "aaaa" * 5000 + " " * 5000)


PAIRS = [("b", "c"), ("a", "b"), ("ab", "c")]  # the first merge of "abc" joins b and c, so "abc" is never a token


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "another text"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "",
        ),
        ({"model": {"ignore_merges": True}}, ""),
        ({"model": {"dropout": 0.5}}, "chance"),
        ({"model": {"merges": PAIRS, "vocab": {"bc": 256, "ab": 257, "abc": 258}}}, "not its own text"),
        (
            {"model": {"merges": [*PAIRS[1:], ("b", "c"), ("a", "bc")], "vocab": {"bc": 256, "ab": 257, "abc": 258}}},
            "two",
        ),
        ({"added_tokens": [{"special": False}]}, "whole words"),
    ],
)
def test_a_tokenizer_with_features_that_the_fast_encoder_lacks_has_none(change, why):
    description = json.loads(BPE.inner.to_str())
    for name, value in change.items():
        if name == "added_tokens":
            description[name].append(description[name][0] | {"id": 400, "content": "whole", "special": False})
        elif isinstance(value, dict) and name == "model":
            vocab = unicode_to_bytes() if "vocab" in value else description["model"]["vocab"]
            description["model"] |= value | {"vocab": vocab | value.get("vocab", {})}
        else:
            description[name] = value
    assert build_fast_encoder(tokenizers.Tokenizer.from_str(json.dumps(description))) is None, why


def test_token_i_of_the_byte_tokenizer_is_byte_i():
    text = "aß日🙂\0\n"
    assert build_byte_tokenizer().encode(text).tolist() == list(text.encode())
    assert (build_byte_tokenizer().end_of_text, build_byte_tokenizer().vocab_size) == (256, 257)
    assert build_byte_tokenizer().token_bytes.tolist() == [1] * 256 + [0]


def test_the_end_of_text_token_is_the_last_and_never_encoded_from_text():
    assert (BPE.end_of_text, BPE.vocab_size) == (399, 400)
    assert BPE.token_bytes.dtype == np.int32
    assert BPE.token_bytes[399] == 0
    whole = BPE.encode(f"a{END_OF_TEXT}b")
    parts = [BPE.encode(part) for part in ("a", "<|", "endoftext", "|>", "b")]
    assert whole.tolist() == np.concatenate(parts).tolist()
    assert BPE.decode([BPE.end_of_text]) == END_OF_TEXT


def test_training_learns_the_same_in_another_process():
    """Hash order, threads and seeds of the process have no effect."""
    program = (
        "import sys, hashlib; from training.data.tokenizer import train_bpe;"
        "print(hashlib.sha256(train_bpe([sys.stdin.read()] * 3, 400).inner.to_str().encode()).hexdigest())"
    )
    for threads in ("1", "3"):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": str(Path.cwd())}
        result = subprocess.run(
            [sys.executable, "-c", program], input=TEXT, text=True, capture_output=True, env=environment
        )
        assert result.stdout.strip() == hashlib.sha256(BPE.inner.to_str().encode()).hexdigest()


def test_training_stops_at_max_bytes():
    learned = build_tokenizer(config.BPETokenizer(vocab_size=400, max_bytes=len(TEXT)), iter([TEXT, "zyzzyva " * 999]))
    assert learned.inner.to_str() == train_bpe([TEXT], 400).inner.to_str()


@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["a", "日", "1", "_!", " ", "\n", "\r\n", " x", "'s", "ß1"]), st.integers(1, 600)),
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_words_are_cut_for_training_only_if_they_are_too_long(parts):
    text, longest = "".join(part * n for part, n in parts), tokenizer_module.MAX_WORD_CHARS
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = splitter.pre_tokenize_str(text)
    cut = list(tokenizer_module.cut_long_words(text))
    assert "".join(cut) == text
    parts = [word for part in cut for word in splitter.pre_tokenize_str(part)]
    assert max((end - start for _, (start, end) in parts), default=0) <= longest + 1  # and the space before it
    if all(end - start <= longest for _, (start, end) in words):
        assert [word for word, _ in parts] == [word for word, _ in words]


def test_the_time_to_learn_from_a_word_does_not_grow_with_the_square_of_its_length():
    """300,000 letters without a space took over four minutes."""
    start = time.process_time()
    learned = train_bpe(["".join(random.Random(0).choices("acgt", k=200_000))], 400)
    assert time.process_time() - start < 5
    assert learned.vocab_size == 400


def test_a_token_id_beyond_all_sizes_is_an_error_before_memory_is_taken(tmp_path):
    spec = json.loads(BPE.inner.to_str())
    spec["model"]["vocab"]["far"] = 1_500_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"tokenizer.json: token id 150000000[01] is not below 16777216, the limit$"):
        build_tokenizer(config.FileTokenizer(path=str(tmp_path)), iter([]))
    with pytest.raises(ValidationError, match="less than or equal to 16777216"):
        config.BPETokenizer(vocab_size=10**12)


def test_a_saved_tokenizer_loads_unchanged(tmp_path):
    BPE.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXT + PROBE).tolist() == BPE.encode(TEXT + PROBE).tolist()
    assert (again.end_of_text, again.vocab_size) == (BPE.end_of_text, BPE.vocab_size)


def test_transformers_opens_a_saved_tokenizer(tmp_path):
    """In a separate process, because importing Transformers takes seconds and triggers warnings."""
    BPE.save(tmp_path)
    program = (
        "import sys, json; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(json.dumps([t(sys.argv[2])['input_ids'], t.eos_token, t.eos_token_id, t.bos_token_id, len(t),"
        "t.decode(t(sys.argv[2])['input_ids'])]))"
    )
    text = "def f( x ):\n\treturn  'naïve 日本' , x !"
    result = subprocess.run([sys.executable, "-c", program, tmp_path, text], text=True, capture_output=True, check=True)
    assert json.loads(result.stdout) == [BPE.encode(text).tolist(), END_OF_TEXT, 399, 399, 400, text]


@needs_gpt2
def test_gpt2_from_its_two_files_gives_gpt2s_tokens(tmp_path):
    tokenizer = build_tokenizer(config.FileTokenizer(path=str(GPT2)), iter([]))
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.dtype) == (50257, 50256, np.dtype("<u2"))
    assert tokenizer.encode("Hello world, it's 2024!").tolist() == [15496, 995, 11, 340, 338, 48609, 0]
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = build_tokenizer(config.FileTokenizer(path=str(path)), iter([]))
        assert again.encode(PROBE).tolist() == tokenizer.encode(PROBE).tolist()


@needs_gpt2
def test_tiktokens_gpt2_is_gpt2(tmp_path, monkeypatch):
    """tiktoken reads its two files from its download cache."""
    blobs = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for theirs, ours in (("vocab.bpe", "merges.txt"), ("encoder.json", "vocab.json")):
        (tmp_path / hashlib.sha1((blobs + theirs).encode()).hexdigest()).write_bytes((GPT2 / ours).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer = build_tokenizer(config.TiktokenTokenizer(name="gpt2"), iter([]))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    same = from_vocab_and_merges(GPT2 / "vocab.json", GPT2 / "merges.txt")
    assert tokenizer.encode(TEXT + PROBE).tolist() == same.encode(TEXT + PROBE).tolist()


def tiktoken_encoding(pattern: str) -> tiktoken.Encoding:
    """Build an encoding with merges of letters and digits, a token that no merges produce, and a gap in its ids."""
    learned = train_bpe([TEXT, "1234 1234. " * 99], 400)
    letters = unicode_to_bytes()
    ranks = {bytes(letters[c] for c in token): i for token, i in learned.inner.get_vocab(False).items() if i < 399}
    return tiktoken.Encoding(
        "mine", pat_str=pattern, mergeable_ranks={**ranks, b"bsbs": 402}, special_tokens={END_OF_TEXT: 405}
    )


@given(text=st.text(alphabet=st.sampled_from("ab'sS12341234 \n\r\tß日!._<|>")))
@settings(max_examples=200, deadline=None)
def test_a_converted_encoding_gives_tiktokens_tokens(text):
    assert CONVERTED.encode(text).tolist() == ENCODING.encode_ordinary(text)


ENCODING = tiktoken_encoding(CL100K)
CONVERTED = from_tiktoken(ENCODING)


def test_a_word_that_is_a_token_stays_one_without_merges():
    assert CONVERTED.encode("bsbs").tolist() == ENCODING.encode_ordinary("bsbs") == [402]


def test_a_converted_encoding_keeps_its_end_of_text_id():
    assert (CONVERTED.end_of_text, CONVERTED.vocab_size) == (405, 406)
    for text in (TEXT, "1234 1234.1234", "end  \n \n", "end \n\n  "):
        assert CONVERTED.encode(text).tolist() == ENCODING.encode_ordinary(text)


def test_a_tokenizer_without_an_end_of_text_gets_one():
    inner = tokenizers.Tokenizer.from_str(train_bpe([TEXT], 300).inner.to_str().replace(END_OF_TEXT, "<end>"))
    tokenizer = Tokenizer(inner, "mine")
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (300, 301)


def test_a_large_vocabulary_uses_four_bytes_per_token():
    vocab = {**unicode_to_bytes(), **{f"a{i}": i for i in range(256, 2**16)}}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = (
        build_byte_tokenizer().inner.pre_tokenizer,
        build_byte_tokenizer().inner.decoder,
    )
    assert Tokenizer(inner, "large").dtype == np.dtype("<u4")
    assert Tokenizer(inner, "large").encode_batch(["a"])[0].dtype == np.dtype("<u4")


def test_truncation_and_padding_of_a_tokenizer_are_switched_off(tmp_path):
    BPE.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding()
    inner.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path)
    assert again.encode(PROBE).tolist() == BPE.encode(PROBE).tolist()
    assert [len(ids) for ids in again.encode_batch([PROBE, "a"])] == [len(BPE.encode(PROBE)), 1]


def with_parts(**parts: object) -> tokenizers.Tokenizer:
    """Return the byte tokenizer with other parts; `added` are added tokens."""
    inner = tokenizers.Tokenizer.from_str(build_byte_tokenizer().inner.to_str())
    inner.add_tokens(parts.pop("added", []))
    for name, part in parts.items():
        setattr(inner, name, part)
    return inner


def without(vocab: dict[str, int], letter: str) -> models.BPE:
    return models.BPE(vocab={token: i for token, i in vocab.items() if token != letter}, merges=[])


BYTES, LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False), unicode_to_bytes()
LOSSY = {  # each leaves PROBE unchanged, or changes text that no fixed text would have
    "é is a letter of the byte alphabet": ({"added": ["é"]}, "its added token 'é' comes back as '\ufffd'"),
    "so is č": ({"added": ["fine", "č"]}, "its added token 'č' comes back as '\\r'"),
    "rstrip": ({"added": [AddedToken("foo", rstrip=True)]}, "comes back as 'x \\tfoofooy'"),
    "lstrip": ({"added": [AddedToken("foo", lstrip=True)]}, "comes back as 'xfoofooy'"),
    "lowercase": ({"normalizer": normalizers.Lowercase()}, "its normalizer Lowercase changes text"),
    "a word": ({"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace("foo", "bar")])}, "Replace"),
    "compatibility": ({"normalizer": normalizers.NFKC()}, "its normalizer NFKC changes text"),
    "a space before": ({"normalizer": normalizers.Prepend("▁")}, "its normalizer Prepend changes text"),
    "a space before words": ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
    "dropped": (
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split("foo", "removed"), BYTES])},
        "its pre-tokenizer Split drops",
    ),
    "white space": ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "its pre-tokenizer Whitespace drops"),
    "SentencePiece": ({"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}, "Metaspace"),
    "a decoder": (
        {"decoder": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])},
        "not made of bytes",
    ),
    "no byte level": ({"pre_tokenizer": pre_tokenizers.Digits()}, "its tokens are not made of bytes"),
    "no token for a byte": ({"model": without(LETTERS, "Ā")}, "it has no token for byte 0x00"),
    "WordPiece": ({"model": models.WordPiece(LETTERS, unk_token="Ā")}, "its model is WordPiece"),
    "words": ({"model": models.WordLevel(LETTERS, unk_token="Ā")}, "its model is WordLevel"),
    "an affix": ({"model": models.BPE(LETTERS, [], end_of_word_suffix="</w>")}, "an affix (end_of_word_suffix)"),
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_lossy_tokenizer_is_an_error_that_says_what_is_lost(tmp_path, case):
    parts, reason = LOSSY[case]
    with_parts(**parts).save(str(tmp_path / "mine.json"))
    with pytest.raises(UserError) as error:
        build_tokenizer(config.FileTokenizer(path=str(tmp_path / "mine.json")), iter([]))
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/mine.json: not a lossless byte-level tokenizer: ") and reason in line, line


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_normalization_that_keeps_characters_is_allowed_and_named(form):
    tokenizer = Tokenizer(with_parts(normalizer=getattr(normalizers, form)(), added=["<x>", "日本"]), "mine")
    assert tokenizer.normalization == form
    text = "e\u0301é <x> 日本\n"
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize(form, text)
    assert build_byte_tokenizer().normalization is None


def test_merges_are_not_left_out_at_random():
    inner = tokenizers.Tokenizer.from_str(BPE.inner.to_str())
    inner.model.dropout = 0.9
    assert Tokenizer(inner, "mine").encode(TEXT).tolist() == BPE.encode(TEXT).tolist()


# --- the end-of-text token of a model --------------------------------------------------------------

NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]  # tokens 256, 257, 258 of `llama`


@pytest.fixture
def llama(tmp_path) -> Path:
    """A folder with a tokenizer like Llama 3's."""
    inner = tokenizers.Tokenizer.from_str(build_byte_tokenizer().inner.to_str().replace(END_OF_TEXT, NAMES[0]))
    inner.add_special_tokens(NAMES[1:])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "separator"),
    [
        ({}, "<|end_of_text|>"),  # the only one with a known name
        ({"config.json": {"eos_token_id": 258}, "tokenizer_config.json": {"eos_token": NAMES[1]}}, "<|eot_id|>"),
        ({"config.json": {"eos_token_id": [257, 258]}}, "<|end_of_text|>"),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": 258}}, "<|eot_id|>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|eot_id|>", "lstrip": False}}}, "<|eot_id|>"),
        ({"special_tokens_map.json": {"eos_token": "<|begin_of_text|>"}}, "<|begin_of_text|>"),
        ({"config.json": {"eos_token_id": 65}, "tokenizer_config.json": {"eos_token": "none"}}, "<|end_of_text|>"),
        ({"config.json": ["eos_token_id"]}, "<|end_of_text|>"),
    ],
)
def test_a_model_keeps_its_own_end_of_text_token(llama, tmp_path_factory, files, separator):
    for name, fields in files.items():
        (llama / name).write_text(json.dumps(fields))
    tokenizer = build_tokenizer(config.FileTokenizer(path=str(llama)), iter([]))
    assert (tokenizer.separator, tokenizer.vocab_size) == (separator, 259)
    assert tokenizer.end_of_text == 256 + NAMES.index(separator)
    assert tokenizer.separators == (separator, END_OF_TEXT)
    assert tokenizer.decode(tokenizer.encode(separator)) == separator and tokenizer.end_of_text not in tokenizer.encode(
        separator
    )
    tokenizer.save(saved := tmp_path_factory.mktemp("saved"))
    assert json.loads((saved / "tokenizer_config.json").read_text())["eos_token"] == separator
    assert Tokenizer.load(saved).separator == separator


def test_the_end_of_text_token_is_part_of_a_tokenizers_identity(llama):
    file, hashes = config.FileTokenizer(path=str(llama / "tokenizer.json")), FileHashes(llama / "digests.json")
    before = tokenizer_identity(file, hashes)
    (llama / "config.json").write_text('{"eos_token_id": 258}')
    assert tokenizer_identity(file, hashes) == [*before[:2], "<|eot_id|>"] != before
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        tokenizer_identity(file, hashes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json here, and no vocab.json with merges.txt"),
        ({"vocab.json": "{}"}, "no tokenizer.json here, and no vocab.json with merges.txt"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer.json": "\udcff"}, "tokenizer.json: cannot be read"),
        ({"vocab.json": "[", "merges.txt": ""}, "vocab.json, merges.txt: not a BPE's vocabulary and merges"),
    ],
)
def test_an_unreadable_tokenizer_is_reported_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(config.FileTokenizer(path=str(tmp_path)), iter([]))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_be_downloaded_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^tokenizer 'nobody/nothing' from the Hugging Face hub cannot be loaded: [^\n]+$"
    ):
        build_tokenizer(config.HuggingFaceTokenizer(name="nobody/nothing"), iter([]))
    with pytest.raises(UserError, match=r"^tiktoken encoding 'nothing' cannot be loaded: [^\n]+$"):
        build_tokenizer(config.TiktokenTokenizer(name="nothing"), iter([]))
    with pytest.raises(UserError, match=rf"is a folder; for its tokenizer write {{type: file, path: {tmp_path}}}"):
        build_tokenizer(config.HuggingFaceTokenizer(name=str(tmp_path)), iter([]))


def test_the_identity_of_a_tokenizer_file_is_its_content(tmp_path):
    BPE.save(tmp_path)
    file = config.FileTokenizer(path=str(tmp_path))
    before = tokenizer_identity(file, FileHashes(tmp_path / "digests.json"))
    build_byte_tokenizer().save(tmp_path)
    assert tokenizer_identity(file, FileHashes(tmp_path / "digests.json")) != before
