"""Folders at a URL: real requests to a real S3 server, and every failure as one line."""

import builtins
import hashlib
from pathlib import Path

import pytest
from s3 import BUCKET

from training.errors import UserError
from training.remote import RemoteFolder, check_scheme, is_url, open_filesystem
from training.remote.folder import is_relative

pytest.importorskip("s3fs")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("place", ["s3", "path", "file"])
def test_files_are_put_read_hashed_copied_and_removed(tmp_path, place):
    url = {"s3": f"s3://{BUCKET}/some", "path": str(tmp_path / "there"), "file": f"file://{tmp_path}/there"}[place]
    folder, source = RemoteFolder(url + "/"), tmp_path / "source"
    source.write_bytes(b"content" * 1000)
    folder.check_writable()
    assert folder.names() == [] and folder.names("a") == [] and folder.read("a/b") is None
    folder.put(source, "a/b")
    folder.write("c", b"small")
    assert folder.names() == ["a/b", "c"] and folder.names("a") == ["a/b"]
    assert folder.read("c") == b"small"
    assert folder.sha256("a/b", 7000) == hashlib.sha256(source.read_bytes()).hexdigest()
    assert folder.sha256("a/b", 7001) is None and folder.sha256("nothing", 1) is None
    folder.fetch("a/b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    folder.copy("a/b", "d/e/f")
    folder.remove("a/b")
    folder.remove("c")
    folder.remove("c")
    assert folder.names() == ["d/e/f"]
    folder.remove("d/e/f")
    assert folder.names() == []


@pytest.mark.usefixtures("s3")
def test_a_large_file_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("training.remote.folder.PIECE", 1000)
    folder, source = RemoteFolder(f"s3://{BUCKET}/large"), tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 10)
    folder.put(source, "x")
    assert folder.sha256("x", 2560) == hashlib.sha256(source.read_bytes()).hexdigest()
    assert folder.sha256("x", 2561) is None and folder.sha256("x", 2559) is None


@pytest.mark.usefixtures("s3")
def test_it_lists_only_names_below_itself(s3_server):
    for name in ("list/a", "list/../b", "list/c/../../d", "listing"):
        s3_server.request("PUT", f"/{BUCKET}/{name}", b"x")
    assert RemoteFolder(f"s3://{BUCKET}/list").names() == ["a"]
    assert is_relative("a/b") and not any(map(is_relative, ("", "/a", "../a", "a/../b", "a//b", "./a", "a\0")))


NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
WRONG = {
    "no bucket": (f"s3://no-{BUCKET}/run", {}, "", 2, "no such bucket"),
    "a wrong name": ("s3://Bucket!/run", {}, "", 2, "ParamValidationError: .*Invalid bucket name"),
    "no credentials": (f"s3://{BUCKET}/run", NO_KEYS, "", 2, "no access .* set AWS_ACCESS_KEY_ID"),
    "no profile": (f"s3://{BUCKET}/run", {"AWS_PROFILE": "none"}, "", 2, "no access .*profile"),
    "no server": (f"s3://{BUCKET}/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "", 1, "not reachable now .*try"),
    "an error": (f"s3://{BUCKET}/run", {}, "500", 1, "not reachable now"),
    "a lost connection": (f"s3://{BUCKET}/run", {}, "drop", 1, "not reachable now"),
    "no answer": (f"s3://{BUCKET}/run", {}, 6.0, 1, "not reachable now .*imeout"),
    "no package": ("gs://bucket/run", {}, "", 2, r"needs the package gcsfs; pip install 'training\[remote\]'"),
    "a file as a folder": ("/etc/hostname/run", {}, "", 2, "/etc/hostname.*: Not a directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_one_line(s3, monkeypatch, case):
    url, variables, fault, status, line = WRONG[case]
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    s3.fault = lambda _number, _request: fault
    with pytest.raises(UserError, match=line) as error:
        RemoteFolder(url).check_writable()
    assert error.value.status == status and "\n" not in str(error.value)
    assert str(error.value).startswith(url) or case == "a file as a folder"


def test_a_missing_package_is_named(monkeypatch):
    original = builtins.__import__

    def without_fsspec(name, *arguments, **named):
        if name.startswith("fsspec"):
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_fsspec)
    with pytest.raises(UserError, match=r"s3://x/y: s3:// needs the package s3fs; pip install 'training\[remote\]'"):
        open_filesystem("s3://x/y")


def test_only_known_schemes_are_opened():
    for url in ("simplecache::s3://a/b", "reference://x", "s3://", "memory://x", "http://"):
        assert check_scheme(url) is not None
        with pytest.raises(UserError, match=r"is no URL of|names no bucket"):
            open_filesystem(url)
    assert check_scheme("https://host/file") is None and check_scheme("https://host/file", is_written=True)
    assert is_url("s3://a") and not is_url("/a/b") and not is_url(str(Path("a:b")))
