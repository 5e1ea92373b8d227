"""A real S3 server (moto's process), and a proxy in front of it that fails in the ways of networks and servers."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"
FAST = '{"config_kwargs": {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 0}}}'


class S3Server:
    """moto's server process, with one bucket."""

    def __init__(self, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        until = time.monotonic() + 60
        while True:
            try:
                self.request("PUT", f"/{BUCKET}")
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.05)

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """Send a request past the proxy; return the body of the reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"}
        connection.request(method, path, body, signed | (headers or {}))
        return connection.getresponse().read()

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all files that begin with a prefix."""
        text = self.request("GET", f"/{BUCKET}?list-type=2&prefix={prefix}").decode()
        return sorted(part.partition("</Key>")[0] for part in text.split("<Key>")[1:])

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self.request("GET", f"/{BUCKET}/{name}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


class Proxy:
    """Forwards requests to an S3 server, counts them, and lets `fault(number, request)` decide on each.

    A fault returns "" to forward the request, "500", "drop" (close the connection without a reply), "lose" (forward it,
    and close the connection without a reply), or a number of seconds to wait before it is forwarded.
    """

    def __init__(self, server: S3Server):
        self.server, self.requests = server, []
        self.fault: Callable[[int, str], str | float] = lambda _number, _request: ""
        self.pid: Callable[[], int] = lambda: 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                """Print nothing."""

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client was killed
                    self.close_connection = True

            def forward(self) -> None:
                proxy.forward(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        """The variables for a process whose S3 server this is."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.http.server_port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "FSSPEC_S3": FAST,
        }

    def forward(self, handler: BaseHTTPRequestHandler) -> None:
        """Handle one request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self.lock:
            request = f"{handler.command} {handler.path}"
            self.requests.append(request)
            fault = self.fault(len(self.requests), request)
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "500":
            handler.send_response(500)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "drop":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.request(handler.command, handler.path, body, dict(handler.headers))
        reply = connection.getresponse()
        content = reply.read()
        if fault == "kill":
            os.kill(self.pid(), signal.SIGKILL)
        if fault in ("lose", "kill"):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                handler.send_header(name, value)
        length = reply.getheader("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", length or str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def kill(self, pid: Callable[[], int], at: int | str, *, is_done: bool) -> None:
        """Kill a process at a request, by its number or pattern, before or after (`is_done`) the server has done it."""
        killed = []

        def fault(number: int, request: str) -> str:
            if not killed and (number == at if isinstance(at, int) else re.search(at, request)):
                killed.append(request)
                if not is_done:
                    os.kill(pid(), signal.SIGKILL)
                return "kill" if is_done else "drop"
            return ""

        self.fault = fault
        self.pid = pid

    def reset(self) -> None:
        """Forward everything again, and count from 1."""
        with self.lock:
            self.requests, self.fault = [], lambda _number, _request: ""

    def close(self) -> None:
        """Stop."""
        self.http.shutdown()
        self.http.server_close()
