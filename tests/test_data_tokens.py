"""Token files of other trainers: the same samples as from text, mapped where they lie, and one line for a bad file."""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import rows, tensors, write_config

from training import prepare as prepare_command
from training.config import DataConfig
from training.data import Dataset, Samples, prepare, token_files
from training.errors import UserError
from training.train import main as train_command

END = 256  # of the byte tokenizer
TEXTS = [f"document {i}: " + "some words, " * (i % 5) + "naïve" for i in range(60)]
DOCUMENTS = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in TEXTS]


def before(documents: list[np.ndarray]) -> np.ndarray:
    """Return tokens as llm.c writes them: the end-of-text token before each document."""
    return np.concatenate([np.append(END, ids) for ids in documents])


def after(documents: list[np.ndarray]) -> np.ndarray:
    """Return tokens as nanoGPT writes them: the end-of-text token after each document."""
    return np.concatenate([np.append(ids, END) for ids in documents])


def write_raw(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> None:
    tokens.astype(dtype).tofile(path)


def write_llm_c(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def write_megatron(path: Path, sequences: list[np.ndarray], documents: list[int] | None = None, code: int = 8) -> None:
    """Write a .bin and its .idx as Megatron-LM's `IndexedDatasetBuilder` does."""
    dtype = np.dtype({4: "<i4", 8: "<u2"}[code])
    lengths = [len(ids) for ids in sequences]
    pointers = np.cumsum([0, *lengths])[:-1] * dtype.itemsize
    documents = list(range(len(sequences) + 1)) if documents is None else documents
    path.write_bytes(b"".join(ids.astype(dtype).tobytes() for ids in sequences))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sequences), len(documents))
    arrays = np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8")
    path.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


def write_three_shards(path: Path, tokens: np.ndarray) -> None:
    """Cut documents at the ends of the files, as llm.c does, and give each file another type."""
    first, second, third = np.split(tokens, [len(tokens) // 3, len(tokens) // 2])
    write_llm_c(path.with_name("shard_000001.bin"), first)
    np.save(path.with_name("shard_000002.npy"), second)
    write_llm_c(path.with_name("shard_000003.bin"), third, 20240801, 7, "<u4")


FORMATS: dict[str, tuple[str, Callable[[Path, list[np.ndarray]], object], dict]] = {
    "nanoGPT": ("a.bin", lambda path, ids: write_raw(path, before(ids)), {}),
    "raw uint32": ("a.bin", lambda path, ids: write_raw(path, before(ids), "<u4"), {"dtype": "uint32"}),
    "llm.c and modded-nanogpt": ("a.bin", lambda path, ids: write_llm_c(path, before(ids)), {}),
    "llm.c for llama-3": ("a.bin", lambda path, ids: write_llm_c(path, before(ids), 20240801, 7, "<u4"), {}),
    "npy of int64": ("a.npy", lambda path, ids: np.save(path, before(ids)), {}),
    "npy of uint16": ("a.npy", lambda path, ids: np.save(path, before(ids).astype("<u2")), {}),
    "Megatron": ("a.bin", lambda path, ids: write_megatron(path, [before([each]) for each in ids]), {}),
    "Megatron of int32, by its index": (
        "a.idx", lambda path, ids: write_megatron(path.with_suffix(".bin"), [before([one]) for one in ids], code=4), {}
    ),
    "three shards": ("shard_*", lambda path, ids: write_three_shards(path, before(ids)), {}),
}  # fmt: skip


def config_of(folder: Path, *sources: dict, **options: object) -> DataConfig:
    default = {"tokenizer": {"type": "byte"}, "cache_dir": str(folder / "cache"), "workers": 1}
    return DataConfig.model_validate(default | {"sources": list(sources)} | options)


def tokens_at(path: Path, **options: object) -> dict:
    return {"type": "tokens", "paths": [str(path)]} | options


def prepared(folder: Path, *sources: dict, **options: object) -> Dataset:
    return prepare(config_of(folder, *sources, **options), quiet=True)


def everything(dataset: Dataset, split: str = "train", n_positions: int = 16) -> np.ndarray:
    """Return the samples of an epoch, (samples, n_positions)."""
    samples = Samples(getattr(dataset, split), n_positions=n_positions, seed=3 if split == "train" else None)
    return np.concatenate(samples.at(range(samples.n_samples)), axis=1)


def write_text(path: Path, texts: list[str]) -> dict:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"paths": [str(path)]}


IDS = before(DOCUMENTS)

# --- the same samples ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_text(tmp_path_factory) -> Dataset:
    """The documents, tokenized by us: all but the last ten to train on."""
    folder = tmp_path_factory.mktemp("text")
    train, val = write_text(folder / "a.jsonl", TEXTS[:-10]), write_text(folder / "b.jsonl", TEXTS[-10:])
    return prepared(folder, train, val_sources=[val])


@pytest.mark.parametrize("case", FORMATS)
def test_a_token_file_gives_the_samples_of_its_text(tmp_path, of_text, case):
    name, write, options = FORMATS[case]
    folders = tmp_path / "train", tmp_path / "val"
    for folder, documents in zip(folders, (DOCUMENTS[:-10], DOCUMENTS[-10:]), strict=True):
        folder.mkdir()
        write(folder / name, documents)
    train, val = (tokens_at(folder / name, **options) for folder in folders)
    dataset = prepared(tmp_path, train, val_sources=[val])
    for split in ("train", "val"):
        assert np.array_equal(everything(dataset, split), everything(of_text, split))
        ours, theirs = getattr(dataset, split), getattr(of_text, split)
        assert (ours.n_bytes, ours.n_tokens, ours.n_documents) == (theirs.n_bytes, theirs.n_tokens, theirs.n_documents)
        assert np.array_equal(ours.streams[0].documents, theirs.streams[0].documents)
    assert dataset.fingerprint == of_text.fingerprint  # a run on the text may go on with the token files
    assert not list(Path(dataset.report["folder"]).glob("*.tokens"))


def test_end_of_text_after_documents_starts_the_next_one(tmp_path):
    write_raw(tmp_path / "a.bin", tokens := after(DOCUMENTS))
    dataset = prepared(tmp_path, tokens_at(tmp_path / "a.bin"), val_sources=[tokens_at(tmp_path / "a.bin")])
    (stream,) = dataset.val.streams
    assert np.array_equal(stream.window(0, len(tokens)), tokens)
    assert stream.documents.tolist() == [0, *np.flatnonzero(tokens == END)[:-1]]
    assert dataset.val.n_documents == len(TEXTS)
    assert dataset.val.n_bytes == sum(len(text.encode()) for text in TEXTS)


def test_documents_without_end_of_text_are_those_of_megatrons_index_and_it_is_said(tmp_path):
    sequences = [part for ids in DOCUMENTS for part in (ids[:5], ids[5:])]
    write_megatron(tmp_path / "a.bin", sequences, documents=[0, *range(2, len(sequences) + 1, 2)])
    dataset = prepared(tmp_path, tokens_at(tmp_path / "a.bin"), val_fraction=0.1)
    starts = np.cumsum([0, *map(len, DOCUMENTS)])[:-1]
    (train,), (val,) = dataset.train.streams, dataset.val.streams
    assert [*train.documents, *(val.documents + len(train.tokens))] == starts.tolist()
    assert any("no end-of-text token (256" in note and "isolate_documents" in note for note in dataset.report["notes"])


def test_the_end_of_a_source_is_held_out_from_a_document_on(tmp_path):
    tokens = before(DOCUMENTS)
    write_three_shards(tmp_path / "shard", tokens)
    dataset = prepared(tmp_path, tokens_at(tmp_path / "shard_*"), val_fraction=0.3)
    border = int(len(tokens) * 0.7)
    cut = border + int(np.flatnonzero(tokens[border:] == END)[0])
    (train,), (val,) = dataset.train.streams, dataset.val.streams
    assert np.array_equal(train.window(0, cut), tokens[:cut]) and len(train.tokens) == cut
    assert np.array_equal(val.window(0, len(tokens)), tokens[cut:])
    write_raw(tmp_path / "b.bin", np.arange(1000) % 256)  # no documents
    dataset = prepared(tmp_path, tokens_at(tmp_path / "b.bin"), val_fraction=0.3)
    assert [dataset.train.n_tokens, dataset.val.n_tokens] == [700, 300]
    assert any("no end-of-text token" in note and "one document" in note for note in dataset.report["notes"])


@pytest.mark.parametrize("weights", [None, (3, 1)])
def test_tokens_and_text_mix(tmp_path, weights):
    write_raw(tmp_path / "a.bin", np.append(END, np.arange(2000) % 100))
    write_raw(tmp_path / "c.bin", np.append(END, np.full(500, 200)))
    sources = [tokens_at(tmp_path / "a.bin"), write_text(tmp_path / "b.jsonl", TEXTS), tokens_at(tmp_path / "c.bin")]
    if weights:
        sources = [source | {"weight": weight} for source, weight in zip(sources, weights, strict=False)]
    dataset = prepared(tmp_path, *sources, val_fraction=0.2)
    names = ["a.bin", "b.jsonl"] if weights else ["a.bin", "b.jsonl", "c.bin"]
    assert [stream.name for stream in dataset.val.streams] == names
    assert all(len(stream.tokens) for stream in dataset.val.streams)
    if weights:
        tokens, _ = Samples(dataset.train, n_positions=16, seed=0).at(range(1024))
        assert 0.74 < (tokens < 100).all(axis=1).mean() + (tokens == END).any(axis=1).mean() / 4 < 0.85
        assert len(dataset.train.streams[0].tokens) == 1600
    else:
        (stream,) = dataset.train.streams
        tokens = stream.window(0, len(stream.tokens))
        text, a, c = np.split(tokens, [len(tokens) - 2000, len(tokens) - 400])
        assert np.array_equal(a[1:], np.arange(1599) % 100) and (c[1:] == 200).all()
        assert np.array_equal(stream.documents, np.flatnonzero(tokens == END))
        assert sum(text == END) == stream.documents.size - 2 > 30


def test_the_named_end_of_text_is_that_of_the_tokenizer_from_then_on(tmp_path):
    tokenizer = json.loads(prepared_tokenizer(tmp_path).read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 257, "content": "<|begin_of_text|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_raw(tmp_path / "a.bin", np.where(IDS == END, 257, IDS))
    options = {"tokenizer": {"type": "file", "path": str(tmp_path)}}
    options |= {"val_sources": [tokens_at(tmp_path / "a.bin")]}
    dataset = prepared(tmp_path, tokens_at(tmp_path / "a.bin", end_of_text=257), **options)
    assert (dataset.tokenizer.separator, dataset.tokenizer.end_of_text) == ("<|begin_of_text|>", 257)
    assert dataset.train.n_documents == dataset.val.n_documents == len(TEXTS)
    assert dataset.train.n_bytes == sum(len(text.encode()) for text in TEXTS)
    for id_, problem in ((65, "the ordinary token 'A'"), (300, "not in its vocabulary")):
        with pytest.raises(UserError, match=problem):
            prepared(tmp_path, tokens_at(tmp_path / "a.bin", end_of_text=id_), **options)


def prepared_tokenizer(folder: Path) -> Path:
    write_raw(folder / "any.bin", np.arange(200))
    return Path(prepared(folder, tokens_at(folder / "any.bin")).report["folder"]) / "tokenizer" / "tokenizer.json"


def test_tokens_and_answers_mix_with_weights(tmp_path):
    write_raw(tmp_path / "a.bin", np.append(END, np.arange(2000) % 100))
    lines = (json.dumps({"question": f"What is {i}?", "answer": f" {i}."}) + "\n" for i in range(200))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    answers = ANSWERS | {"paths": [str(tmp_path / "a.jsonl")], "weight": 1}
    dataset = prepared(tmp_path, tokens_at(tmp_path / "a.bin", weight=1), answers, val_fraction=0.2)
    tokens, targets = Samples(dataset.train, n_positions=32, seed=0).at(range(1024))
    is_raw = (tokens[:, 1:] == (tokens[:, :-1] + 1) % 100).mean(axis=1) > 0.9
    assert is_raw.sum() == 512
    assert (targets[is_raw] >= 0).all() and (targets[~is_raw] < 0).any(axis=1).all()
    assert [stream.name for stream in dataset.val.streams] == ["a.bin", "a.jsonl"]


# --- the cache, and files that change --------------------------------------------------------------


def test_moved_files_are_the_same_data_and_changed_ones_are_not(tmp_path):
    path = tmp_path / "a.bin"
    write_raw(path, before(DOCUMENTS))
    first = prepared(tmp_path, tokens_at(path))
    os.utime(path, (1, 1))
    path.rename(path := tmp_path / "b.bin")
    again = prepared(tmp_path, tokens_at(path))
    assert again.report["is_cached"] and again.fingerprint == first.fingerprint
    assert np.array_equal(everything(again), everything(first))
    write_raw(path, before(DOCUMENTS[::-1]))
    changed = prepared(tmp_path, tokens_at(path))
    assert not changed.report["is_cached"] and changed.fingerprint != first.fingerprint


def test_a_file_that_is_cut_or_rewritten_while_it_is_mapped_is_an_error_and_a_touched_one_is_not(tmp_path):
    path = tmp_path / "a.bin"
    write_raw(path, tokens := np.tile(before(DOCUMENTS), 20))
    dataset = prepared(tmp_path, tokens_at(path))
    expected = everything(dataset)
    os.utime(path, (1, 1))
    assert np.array_equal(everything(dataset), expected)
    with path.open("r+b") as file:
        file.write(tokens[:9][::-1].astype("<u2").tobytes())
    with pytest.raises(UserError, match=rf"{path}: changed while it was read; restore it"):
        everything(dataset)
    write_raw(path, tokens)
    dataset = prepared(tmp_path, tokens_at(path))
    os.truncate(path, 4096)  # reading further would end this process with SIGBUS
    with pytest.raises(UserError, match=rf"{path}: cut to 4096 bytes while it was read; restore it"):
        everything(dataset)


@pytest.mark.parametrize("end", ["removed", "replaced"])
def test_a_mapped_file_that_is_removed_or_replaced_is_read_as_it_was(tmp_path, end):
    path = tmp_path / "a.bin"
    write_raw(path, before(DOCUMENTS))
    dataset = prepared(tmp_path, tokens_at(path))
    expected = everything(dataset)
    path.unlink()
    if end == "replaced":
        write_raw(path, np.zeros(9))
    assert np.array_equal(everything(dataset), expected)


def test_a_file_that_changes_while_it_is_scanned_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_raw(path, before(DOCUMENTS))
    blocks = token_files.TokenFile.blocks

    def and_change(self, start: int, stop: int):
        yield from blocks(self, start, stop)
        write_raw(path, before(DOCUMENTS[::-1]))

    monkeypatch.setattr(token_files.TokenFile, "blocks", and_change)
    with pytest.raises(UserError, match="changed while they were read"):
        prepared(tmp_path, tokens_at(path))


def test_more_files_than_a_process_may_open_raise_its_limit(tmp_path):
    tokens = before(DOCUMENTS)
    for i, part in enumerate(np.array_split(tokens, 200)):
        write_raw(tmp_path / f"{i:03}.bin", part)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        dataset = prepared(tmp_path, tokens_at(tmp_path / "*.bin"), val_sources=[tokens_at(tmp_path / "*.bin")])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(dataset.val.streams[0].window(0, len(tokens)), tokens)


def test_a_dataset_of_a_version_without_token_files_opens(tmp_path):
    source = write_text(tmp_path / "a.jsonl", TEXTS)
    first = prepared(tmp_path, source)
    path = Path(first.report["folder"]) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["is_joined"]
    for record in manifest["streams"]:
        for name in ("files", "start", "is_separated"):
            del record[name]
    path.write_text(json.dumps(manifest))
    again = prepared(tmp_path, source)
    assert again.report["is_cached"] and again.fingerprint == first.fingerprint
    assert np.array_equal(everything(again), everything(first))


# --- runs ------------------------------------------------------------------------------------------


def run_options(folder: Path, options: Callable, **changes: object) -> dict:
    write_three_shards(folder / "shard", np.tile(before(DOCUMENTS), 3))
    data = config_of(folder, tokens_at(folder / "shard_*"), val_fraction=0.2).model_dump(mode="json")
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "isolate_documents": True}
    return options(data=data, model=model, **changes)


def test_a_run_goes_on_with_renamed_token_files_bit_for_bit_and_not_with_changed_ones(options, tmp_path, capsys):
    config = run_options(tmp_path, options, steps=6, schedule={"type": "constant", "warmup_steps": 2})
    path = write_config(tmp_path / "run.yaml", config)
    assert train_command(["--config", str(path), "--name", "through"]) == 0
    command = ["--config", str(path), "--name", "cut"]
    assert train_command([*command, "--steps", "3"]) == 0
    for shard in sorted(tmp_path.glob("shard_*")):
        shard.rename(shard.with_name(shard.name.replace("shard", "moved")))
    config["data"]["sources"][0]["paths"] = [str(tmp_path / "moved_*")]
    write_config(path, config)
    last = tmp_path / "moved_000003.bin"
    content = last.read_bytes()
    patch(last, 1500, b"A")
    capsys.readouterr()
    assert train_command(command) == 2
    assert "/moved_*; choose another --name" in capsys.readouterr().err
    last.write_bytes(content)
    assert train_command(command) == 0
    assert tensors(tmp_path / "runs/cut", 6) == tensors(tmp_path / "runs/through", 6)
    losses = [[row["loss"] for row in rows(tmp_path / "runs" / name)] for name in ("cut", "through")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_micro_batch_and_two_ranks_compute_the_same(processes, options, tmp_path):
    results = []
    for name, micro_batch in (("one", 8), ("small", 2), ("ranks", 4)):
        config = run_options(tmp_path, options, name=name, steps=4, micro_batch=micro_batch)
        command = ["--config", str(write_config(tmp_path / f"{name}.yaml", config))]
        if name == "ranks":
            done = processes.run("training.train:main", *command, n_ranks=2)
            assert done.returncode == 0, done
        else:
            assert train_command(command) == 0
        results.append([row["loss"] for row in rows(tmp_path / "runs" / name) if "loss" in row])
    assert len(results[0]) == 4
    for other in results[1:]:
        assert np.allclose(results[0], other, rtol=0, atol=1e-5)


def test_evaluate_reads_token_files_as_the_run_does(options, tmp_path, call):
    config = run_options(tmp_path, options, name="judged", steps=2)
    write_raw(tmp_path / "val.bin", before(DOCUMENTS[:20]))
    write_text(tmp_path / "val.jsonl", TEXTS[:20])
    config["data"]["val_sources"] = [tokens_at(tmp_path / "val.bin")]
    assert train_command(["--config", str(write_config(tmp_path / "run.yaml", config))]) == 0
    paths = [str(tmp_path / "val.bin"), str(tmp_path / "val.jsonl")]
    results = [
        json.loads(call("evaluate", "--run", str(tmp_path / "runs/judged"), "--json", *data).stdout)
        for data in ([], ["--data", paths[0]], ["--data", *paths])
    ]
    own, tokens, both = (result["rows"] for result in results)
    assert [own[0] | {"name": paths[0]}] == tokens
    assert [row["name"] for row in both] == paths
    assert both[0] == tokens[0] == both[1] | {"name": paths[0]}


# --- bad files -------------------------------------------------------------------------------------


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def megatron(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Write a data set of Megatron-LM at PATH and change it."""

    def write(path: Path) -> None:
        write_megatron(path, [before([ids]) for ids in DOCUMENTS])
        change(path)

    return write


def idx(path: Path) -> Path:
    return path.with_suffix(".idx")


def shortened(write: Callable, by: int) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        write(path, IDS)
        os.truncate(path, path.stat().st_size - by)

    return cut


N = len(DOCUMENTS)
BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty": ("a.bin", lambda path: path.write_bytes(b""), "a.bin: no tokens in this file"),
    "an odd size": ("a.bin", shortened(write_raw, 1), "bytes are no multiple of the 2 of a token in uint16"),
    "longer integers": ("a.bin", lambda p: write_raw(p, IDS, "<u4"), "every second integer of 16 bits is 0"),
    "llm.c cut by a token": ("a.bin", shortened(write_llm_c, 2), "a.bin: cut short: "),
    "llm.c with more": ("a.bin", shortened(write_llm_c, -2), "a.bin: longer than its header says: "),
    "llm.c cut in its header": ("a.bin", lambda p: p.write_bytes(struct.pack("<3i", 20240520, 1, 9)), "in its header"),
    "llm.c of no tokens": ("a.bin", lambda path: write_llm_c(path, IDS[:0]), "a.bin: no tokens in this file"),
    "another version": ("a.bin", lambda p: write_llm_c(p, IDS, version=2), "version 2 of a token file with magic"),
    "another magic": ("a.bin", lambda p: write_llm_c(p, IDS, magic=20240326), "with the magic number 20240326"),
    "llm.c's items": ("a.bin", lambda p: write_llm_c(p, IDS, magic=20240522), "llm.c's multiple-choice items"),
    "text": ("a.bin", lambda path: path.write_text("some text\n" * 99), "a.bin: text, not tokens"),
    "torch.save": ("a.bin", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(range(200))), "a zip archive"),
    "an unwritten rest": ("a.bin", lambda p: write_raw(p, np.append(IDS, np.zeros(2**14))), "tokens are all 0"),
    "beyond the vocabulary": ("a.bin", lambda path: write_raw(path, np.append(IDS, 257)), f"token {len(IDS):,} of it"),
    "negative": ("a.npy", lambda path: np.save(path, np.append(IDS, -1)), f"token {len(IDS):,} of it is -1, and"),
    "floats": ("a.npy", lambda path: np.save(path, IDS / 2), "a.npy: its numbers are <f8 (float64)"),
    "big-endian": ("a.npy", lambda path: np.save(path, IDS.astype(">u2")), "a.npy: its numbers are >u2 (uint16)"),
    "uint64": ("a.npy", lambda path: np.save(path, IDS.astype("<u8")), "a.npy: its numbers are <u8 (uint64)"),
    "two dimensions": ("a.npy", lambda path: np.save(path, IDS[:100].reshape(2, 50)), "of shape (2, 50)"),
    "pickled": ("a.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "its numbers are |O (object)"),
    "no npy": ("a.npy", lambda path: write_raw(path, IDS), "a.npy: not a .npy file"),
    "npy cut in its header": ("a.npy", lambda p: (np.save(p, IDS), os.truncate(p, 40)), "a.npy: not a .npy file, or"),
    "npy cut by a token": ("a.npy", lambda p: (np.save(p, IDS), os.truncate(p, 1000)), "a.npy: cut short: 1,000 bytes"),
    "no index": ("a_text_document.bin", lambda p: write_raw(p, IDS), "a_text_document.idx is not beside it"),
    "no bin": ("a.idx", lambda p: p.write_bytes(b"MMIDIDX\0\0"), "a.idx: Megatron-LM's index, but a.bin is not"),
    "index of another magic": ("a.bin", megatron(lambda p: patch(idx(p), 0, b"TNTIDX")), "magic number is b'TNTIDX"),
    "index of another version": ("a.bin", megatron(lambda p: patch(idx(p), 9, b"\2")), "version 2 of Megatron-LM's"),
    "index of an unknown code": ("a.bin", megatron(lambda p: patch(idx(p), 17, b"\x0b")), "a.idx: 11 is no code"),
    "index of floats": ("a.bin", megatron(lambda p: patch(idx(p), 17, b"\x07")), "a.idx: its numbers are <f4"),
    "index cut": ("a.bin", megatron(lambda p: os.truncate(idx(p), 99)), "a.idx: cut short: 99 bytes"),
    "index cut in its header": ("a.bin", megatron(lambda p: os.truncate(idx(p), 20)), "a.idx: cut short in its header"),
    "bin cut": ("a.bin", megatron(lambda p: os.truncate(p, 100)), "and the .bin has 100"),
    "index of another order": ("a.bin", megatron(lambda p: patch(idx(p), 34, struct.pack("<i", 1))), "do not follow"),
    "documents that do not cover": (
        "a.bin", megatron(lambda p: patch(idx(p), 34 + 12 * N, struct.pack("<q", 1))), "its documents do not cover"
    ),
    "another ending": ("a.parquet", lambda path: write_raw(path, IDS), "a.parquet: no token file: its name does not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_token_file_is_one_line(tmp_path, capsys, case):
    name, write, message = BAD[case]
    write(tmp_path / name)
    data = config_of(tmp_path, tokens_at(tmp_path / name)).model_dump(mode="json")
    assert prepare_command.main(["--config", str(write_config(tmp_path / "run.yaml", {"data": data}))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and str(tmp_path) in lines[0], lines
    assert not list((tmp_path / "cache").glob("*/*"))


ANSWERS = {"paths": ["a.jsonl"], "prompt_column": "question", "completion_column": "answer"}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({}, {"tokenizer": {"type": "bpe"}}, "token files need the one that made them"),
        ({"end_of_text": 3}, {"val_sources": [tokens_at(Path("a.bin"), end_of_text=4)]}, "the end_of_text 3 and 4"),
        ({"dtype": "float32"}, {}, "Input should be 'uint8', 'uint16'"),
        ({}, {"sources": [tokens_at(Path("a.bin")), ANSWERS]}, "give every source a weight: token files and rows with"),
    ],
)
def test_options_that_do_not_fit_token_files_are_named(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, tokens_at(tmp_path / "a.bin", **source), **options)


def test_a_type_must_be_that_of_the_header_and_hold_the_vocabulary(tmp_path):
    write_llm_c(tmp_path / "a.bin", IDS)
    with pytest.raises(UserError, match="its header says uint16, and the option dtype uint32"):
        prepared(tmp_path, tokens_at(tmp_path / "a.bin", dtype="uint32"))
    tokenizer = json.loads(prepared_tokenizer(tmp_path).read_text())
    tokenizer["model"]["vocab"]["!!!"] = 70_000
    write_raw(tmp_path / "a.bin", IDS)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = {"tokenizer": {"type": "file", "path": str(tmp_path)}}
    with pytest.raises(UserError, match=r"a.bin: no header, and data.tokenizer has .* more than uint16 holds; set"):
        prepared(tmp_path, tokens_at(tmp_path / "a.bin"), **options)
    assert prepared(tmp_path, tokens_at(tmp_path / "a.bin", dtype="uint16"), **options).train.n_tokens


def test_folders_and_links_are_searched_and_what_is_left_out_is_said(tmp_path, capsys):
    folder = tmp_path / "tokens"
    folder.mkdir()
    write_raw(folder / "b.bin", IDS[:100])
    np.save(folder / "a.npy", IDS[100:])
    (folder / "README.md").write_text("how they were made")
    (folder / "c.bin").symlink_to(folder / "b.bin")
    dataset = prepare(config_of(tmp_path, tokens_at(folder), val_sources=[tokens_at(folder)]))
    tokens = np.concatenate([IDS[100:], IDS[:100]])
    assert np.array_equal(dataset.val.streams[0].window(0, len(tokens) + 1), tokens)
    said = capsys.readouterr().err
    assert f"{folder}: left out 1 .md file: token files end in .bin, .npy or .idx" in said
    assert f'tokens: {len(tokens):,} tokens in 2 files, read where they lie; they begin with "' in said
    assert "validation files of tokens that are also training files: 2; their loss is not that of unseen text" in said
    with pytest.raises(UserError, match=r"tokens/\*.bin2: no such file or folder, and as a glob it matches none"):
        prepared(tmp_path, tokens_at(folder / "*.bin2"))
