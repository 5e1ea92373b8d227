"""Data sets of Hugging Face: chosen files, and a validation split of their own."""

import json
from pathlib import Path

import datasets
import pytest
from pydantic import ValidationError
from test_text_options import config_of, texts

from training.config import HuggingFaceSource
from training.data import prepare
from training.data.sources import build_reader
from training.errors import UserError


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache_of_datasets")


def save(folder: Path, **splits: int) -> dict:
    """Save a `DatasetDict` with as many documents in each split; return a source that reads it."""
    by_name = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(n)]}) for name, n in splits.items()
    }
    datasets.DatasetDict(by_name).save_to_disk(str(folder))
    return {"type": "huggingface", "name": str(folder)}


def write(folder: Path, **splits: int) -> dict:
    """Write a folder with a file of rows for each split; return a source that reads it."""
    folder.mkdir()
    for name, n in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(n)))
    return {"type": "huggingface", "name": str(folder)}


@pytest.mark.parametrize("make", [save, write])
def test_a_validation_split_is_the_validation_text(tmp_path, make, capsys):
    source = make(tmp_path / "set", train=50, validation=5, test=3)
    for _ in range(2):  # built, and from the cache
        dataset = prepare(config_of(tmp_path, source, val_fraction=0.5))
        assert texts(dataset, "train") == [f"train {i}" for i in range(50)]
        assert texts(dataset, "val") == [f"validation {i}" for i in range(5)]
        assert "data: set: its split 'validation' is the validation text; no document is held out (val_split)\n" in (
            capsys.readouterr().err
        )
    assert dataset.report["is_cached"]
    dataset = prepare(config_of(tmp_path, source | {"val_split": "test"}), quiet=True)
    assert texts(dataset, "val") == [f"test {i}" for i in range(3)]
    held_out = prepare(config_of(tmp_path, source | {"val_split": None}, val_fraction=0.5), quiet=True)
    assert sorted(texts(held_out, "train") + texts(held_out, "val")) == sorted(f"train {i}" for i in range(50))
    explicit = prepare(config_of(tmp_path, source, val_sources=[source | {"split": "test"}]), quiet=True)
    assert texts(explicit, "val") == [f"test {i}" for i in range(3)]


def test_other_sources_have_documents_held_out_and_a_limit_holds_for_each_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(100)))
    sources = [
        {"paths": [str(tmp_path / "rows.jsonl")]},
        save(tmp_path / "set", train=50, validation=9) | {"limit": {"documents": 4}},
    ]
    dataset = prepare(config_of(tmp_path, *sources), quiet=True)
    val = texts(dataset, "val")
    assert val[-4:] == [f"validation {i}" for i in range(4)] and 5 < len(val[:-4]) < 40
    assert texts(dataset, "train")[-4:] == [f"train {i}" for i in range(4)]
    assert [stream.name for stream in dataset.val.streams] == ["rows.jsonl", "set"]


def test_text_that_an_older_version_prepared_stays_in_use(tmp_path):
    """It held documents out; a run that it began goes on. A chosen split is another matter."""
    source = save(tmp_path / "set", train=50, validation=5)
    old = prepare(config_of(tmp_path, source | {"val_split": None}), quiet=True)
    manifest = Path(old.report["folder"]) / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "val_splits"}))
    again = prepare(config_of(tmp_path, source), quiet=True)
    assert again.report["is_cached"] and again.fingerprint == old.fingerprint
    assert any("by an earlier version, which held documents out and used no" in note for note in again.report["notes"])
    chosen = prepare(config_of(tmp_path, source | {"val_split": "validation"}), quiet=True)
    assert texts(chosen, "val") == [f"validation {i}" for i in range(5)]


def test_a_data_set_without_a_validation_split_has_the_key_it_had(tmp_path):
    source = save(tmp_path / "set", train=50)
    first = prepare(config_of(tmp_path, source), quiet=True)
    assert prepare(config_of(tmp_path, source | {"val_split": None}), quiet=True).report["is_cached"]
    assert sorted(texts(first, "train") + texts(first, "val")) == sorted(f"train {i}" for i in range(50))
    both = save(tmp_path / "both", train=20, validation=20)  # a split to train on validates nothing
    dataset = prepare(config_of(tmp_path, both | {"split": "validation"}), quiet=True)
    assert sorted(texts(dataset, "train") + texts(dataset, "val")) == sorted(f"validation {i}" for i in range(20))


def test_data_files_choose_files_of_a_folder(tmp_path):
    source = write(tmp_path / "set", a=3, b=4, c=5)
    for files, expected in {
        ("a.jsonl",): ["a 0", "a 1", "a 2"],
        ("[ab].jsonl",): None,
        ("a.jsonl", "c.jsonl"): None,
    }.items():
        reader = build_reader(HuggingFaceSource(**source, data_files=files))
        documents = ["".join(each.chunks) for each in reader.documents()]
        assert documents == expected or len(documents) == {"[ab].jsonl": 7, "a.jsonl": 8}[files[0]]
    prepared = [
        prepare(config_of(tmp_path, source | {"data_files": [name]}, val_fraction=0.5), quiet=True)
        for name in ("b*", "c*")
    ]
    assert len({dataset.report["folder"] for dataset in prepared}) == 2
    with pytest.raises(UserError, match=r"set: its splits cannot be listed: \w*Error: [^\n]*none[^\n]*$"):
        prepare(config_of(tmp_path, source | {"data_files": ["none*"]}), quiet=True)
    saved = save(tmp_path / "saved", train=3)
    with pytest.raises(UserError, match=r"saved: data_files has no effect on a folder that `save_to_disk` wrote"):
        prepare(config_of(tmp_path, saved | {"data_files": ["a"]}), quiet=True)


def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    source = save(tmp_path / "set", train=3, test=3)
    with pytest.raises(UserError, match=r"set: no split 'dev'; there are train, test \(val_split\)$"):
        prepare(config_of(tmp_path, source | {"val_split": "dev"}), quiet=True)
    with pytest.raises(ValidationError, match="'test' is also the split to train on"):
        HuggingFaceSource(**source, split="test", val_split="test")
