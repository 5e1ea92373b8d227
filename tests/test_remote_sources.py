"""Text at URLs: a real S3 server and a real web server, what changes there, and every failure as one line."""

import gzip
import io
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError
from s3 import BUCKET
from test_text_options import config_of, texts

from training.config import FilesSource
from training.data import prepare
from training.data.notes import describe_left_out
from training.data.sources import build_reader
from training.errors import UserError

pytest.importorskip("s3fs")


def read(*urls: str, **options: str) -> list[str]:
    return ["".join(each.chunks) for each in build_reader(FilesSource(paths=urls, **options)).documents()]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": each}).encode() + b"\n" for each in texts)


@pytest.fixture
def put(s3_server, request):
    """A function that puts a file into a folder of this test alone and returns the folder's URL."""
    folder = re.sub(r"\W+", "-", request.node.name).strip("-")

    def put(name: str, content: bytes) -> str:
        s3_server.request("PUT", f"/{BUCKET}/{folder}/{name}", content)
        return f"s3://{BUCKET}/{folder}"

    return put


@pytest.mark.usefixtures("s3")
def test_objects_are_found_and_read_as_files_are(put):
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["from parquet"] * 2}), table)
    files = {
        "a.txt": b"text\r\n", "b/c.jsonl.gz": gzip.compress(jsonl("x" * 300_000, "row")), "b/d.csv": b"text\na\n",
        "b/e.csv": b"n\n1\n", "f.parquet": table.getvalue(), "g.json.gz": gzip.compress(jsonl("packed")),
        "package.json": b"{}", ".hidden/a.txt": b"no", "b/__pycache__/a.py": b"no", "h.bin": b"no",
    }  # fmt: skip
    *_, url = (put(name, content) for name, content in files.items())
    everything = ["text\r\n", "x" * 300_000, "row", "a", "from parquet", "from parquet", "packed"]
    assert read(url) == read(url + "/") == everything
    assert read(f"{url}/a.txt", f"{url}/b/*.gz") == everything[:3]
    (line,) = describe_left_out([build_reader(FilesSource(paths=(url,)))])
    for kind in (
        "1 .bin file",
        "1 .json file",
        "1 .csv file without the text_column",
        "1 hidden file",
        "1 __pycache__ f",
    ):
        assert kind in line
    with pytest.raises(UserError, match=r"h.bin: no usable file \(there are 1 .bin file\): no name ends in .txt"):
        read(f"{url}/h.bin")


@pytest.mark.usefixtures("s3")
def test_a_changed_object_makes_another_dataset(tmp_path, put):
    url = put("a.jsonl", jsonl(*(f"text {i}" for i in range(50))))
    first = prepare(config_of(tmp_path, {"paths": [url]}), quiet=True)
    assert sorted(texts(first, "train") + texts(first, "val")) == sorted(f"text {i}" for i in range(50))
    assert prepare(config_of(tmp_path, {"paths": [f"{url}/a.jsonl"]}), quiet=True).report["is_cached"]
    put("a.jsonl", jsonl(*(f"next {i}" for i in range(50))))  # of the same size
    second = prepare(config_of(tmp_path, {"paths": [url]}), quiet=True)
    assert second.fingerprint != first.fingerprint and not second.report["is_cached"]


@pytest.mark.usefixtures("s3")
def test_an_object_that_changes_while_it_is_read_is_an_error(put):
    url = put("a.jsonl", jsonl("first", "second"))
    reader = build_reader(FilesSource(paths=(url,)))
    documents = reader.documents()
    next(documents)
    put("a.jsonl", jsonl("other"))
    with pytest.raises(UserError, match=r"a.jsonl: changed while it was read; start again$"):
        list(documents)
    with pytest.raises(UserError, match=r"a.jsonl: changed while it was read; start again$"):
        list(reader.documents())


FAULTS = {
    "an error": ("500", "not reachable now"),
    "a lost connection": ("drop", "not reachable now"),
    "no answer": (6.0, "not reachable now .*imeout"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_server_that_fails_in_the_middle_is_one_line(s3, put, case):
    fault, message = FAULTS[case]
    url = put("a.txt", b"some text\n" * 1_000_000)  # fetched in three requests
    documents = build_reader(FilesSource(paths=(f"{url}/a.txt",))).documents()
    s3.fault = lambda _number, request: fault if request.startswith("GET") and s3.n_read > 0 else ""
    s3.n_read = 0
    chunks = next(documents).chunks
    next(chunks)
    s3.n_read = 1
    with pytest.raises(UserError, match=rf"^{url}/a.txt: {message}[^\n]*$"):
        list(chunks)


@pytest.mark.parametrize(
    ("url", "variables", "message"),
    [
        (f"s3://no-{BUCKET}/a.txt", {}, "no such bucket, folder or file"),
        (f"s3://{BUCKET}/none/a.txt", {}, "no such bucket, folder or file"),
        (f"s3://{BUCKET}/none/*.txt", {}, "no usable file: no name ends in .txt"),
        (
            f"s3://{BUCKET}/a.txt",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "no access .* set AWS_ACCESS_KEY_ID",
        ),
        ("gs://bucket/a.txt", {}, r"needs the package gcsfs; pip install 'training\[remote\]'"),
        ("https://127.0.0.1:9/a.txt", {}, "not reachable now .*Connect"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_what_is_not_there_is_one_line(monkeypatch, url, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError) as error:
        read(url)
    assert str(error.value).startswith(f"{url}: ") and "\n" not in str(error.value)
    assert re.search(message, str(error.value)), str(error.value)


def test_a_scheme_that_is_not_known_is_an_error_of_the_configuration():
    for url in ("ftp://host/a.txt", "memory://a.txt", "s3://"):
        with pytest.raises(ValidationError, match=r"is no URL of s3://, gs://, az://|names no bucket"):
            FilesSource(paths=(url,))


# --- web servers -----------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path):
    """A web server of the folder `tmp_path / "web"`; `web.fault` is a status for every request."""
    (tmp_path / "web" / "b").mkdir(parents=True)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def send_head(self):
            if server.fault:
                self.send_error(server.fault)
                return None
            return super().send_head()

        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Last-Modified" or not server.is_mute:
                super().send_header(keyword, value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web")))
    server.fault, server.is_mute, server.folder = 0, False, tmp_path / "web"
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_web_servers_files_are_read(web, tmp_path):
    (web.folder / "a.txt").write_bytes(b"some text\n" * 100_000)
    (web.folder / "b" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl("one", "two")))
    assert read(f"{web.url}/b/c.jsonl.gz", f"{web.url}/a.txt") == ["one", "two", "some text\n" * 100_000]
    assert read(f"{web.url}/b/") == ["one", "two"]
    first = prepare(config_of(tmp_path, {"paths": [f"{web.url}/a.txt"]}), quiet=True)
    assert prepare(config_of(tmp_path, {"paths": [f"{web.url}/a.txt"]}), quiet=True).report["is_cached"]
    (web.folder / "a.txt").write_bytes(b"other text\n" * 100_000)
    assert prepare(config_of(tmp_path, {"paths": [f"{web.url}/a.txt"]}), quiet=True).fingerprint != first.fingerprint


def test_a_web_servers_errors_are_one_line(web):
    (web.folder / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"^http://.*/none.txt: no such bucket, folder or file"):
        read(f"{web.url}/none.txt")
    web.is_mute = True
    with pytest.raises(UserError, match=r"a.txt: the server gives neither an ETag nor a time of change"):
        read(f"{web.url}/a.txt")
    web.fault = 503
    with pytest.raises(UserError, match=r"^http://.*/a.txt: [^\n]*503[^\n]*$"):
        read(f"{web.url}/a.txt")
