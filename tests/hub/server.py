"""A server that speaks the Hub's HTTP protocol, with faults on demand, for the real huggingface_hub client.

By hand: `python -m tests.hub.server --port 0` prints its URL; then `HF_ENDPOINT=URL HF_TOKEN=hf_… launcher train …`.
Faults by hand: `curl -X POST URL/__faults -d '{"match": "POST .*/commit/", "status": 503, "times": 3}'`; the state:
`curl URL/__state`.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.routes import Routes
from tests.hub.state import LFS_SUFFIXES, ApiError, Blob, Bucket, Repo, Store, git_id

WRITE_TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34


@dataclass
class Fault:
    """What happens to requests whose `METHOD path` matches, `times` times (None: always), the first `skip` excepted.

    status: answer with it. reset: cut the connection in the middle of the body. hang: stay silent for so many
    seconds. lose_reply: do what is asked, then cut the connection without an answer.
    content, headers: with status, what it answers. endless: answer with `prefix` and then `content` without an end.
    change: edits the true JSON answer.
    """

    match: str
    status: int | None = None
    message: str = "injected"
    code: str | None = None
    retry_after: int | None = None
    reset: bool = False
    hang: float | None = None
    lose_reply: bool = False
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    endless: bool = False
    prefix: bytes = b""
    change: Callable[[Any], Any] | None = None
    sent_bytes: int = 0
    times: int | None = 1
    skip: int = 0
    hits: int = 0


_PART_BYTES, _MIN_SLEEP_S = 1 << 20, 0.02
"""In large parts and with few wake-ups: benchmarks run it beside what they measure, and a Hub has cores of its own."""


class HubServer:
    """In-process server; use as a context manager. All state is open to the tests."""

    def __init__(self, data_dir: Path, port: int = 0, bytes_per_s: float | None = None) -> None:
        self.store = Store(data_dir)
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.buckets: dict[str, Bucket] = {}
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.paths_asked: list[str] = []
        self.uploaded_bytes = 0
        self.bytes_per_s = bytes_per_s
        self.max_commits_per_hour: int | None = None
        self.page_size = 1000
        self.lock = threading.RLock()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, match: str, **details: Any) -> Fault:
        fault = Fault(match, **details)
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        with self.lock:
            self.faults.clear()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def add_repo(self, name: str, files: dict[str, bytes]) -> Repo:
        """A repository with these files in one commit; a data set's name is datasets/ORG/NAME."""
        repo = self.repos[name] = Repo(name)
        blobs = {}
        for path, data in files.items():
            is_lfs = path.endswith(LFS_SUFFIXES)
            blobs[path] = Blob(self.store.put(data), len(data), git_id(data), is_lfs)
        repo.add_commit(repo.branches, "main", "initial commit", blobs, None)
        return repo

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        blob = self.repos[repo].resolve(revision).files[path]
        return self.store.read(blob.sha256, blob.size)

    def state(self) -> dict[str, Any]:
        return {
            name: {
                "commits": [c.title for c in repo.history()],
                "tags": sorted(repo.tags),
                "files": {p: b.size for p, b in sorted(repo.files.items())},
                "squashes": repo.squashes,
            }
            for name, repo in self.repos.items()
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that the faults cut


class _Handler(Routes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:  # type: ignore[override]
        return self.server.hub

    # ------------------------------------------------------------------ one request

    def _serve(self) -> None:
        path = urlsplit(self.path)
        line = f"{self.command} {path.path}"
        fault = self._fault(line)
        if fault is not None and self._apply(fault):
            return
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(line)
        try:
            answer = self.route(unquote(path.path), {k: v[0] for k, v in parse_qs(path.query).items()}, body)
            status, headers, content = answer
        except ApiError as error:
            status, headers = error.status, error.headers
            content = json.dumps({"error": error.message}).encode()
        if fault is not None and fault.change is not None:
            content = json.dumps(fault.change(json.loads(content))).encode()
        if fault is not None and fault.lose_reply:
            self._cut()
            return
        self._reply(status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def _fault(self, line: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if re.search(fault.match, line):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    if fault.times is None or fault.hits < fault.times:
                        fault.hits += 1
                        return fault
        return None

    def _apply(self, fault: Fault) -> bool:
        """Whether the request ends here."""
        if fault.hang is not None:
            time.sleep(fault.hang)
            self._cut()
            return True
        if fault.reset:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length // 2)
            self._cut()
            return True
        if fault.endless:
            self._body()
            self._pour(fault)
            return True
        if fault.status is not None:
            self._body()
            headers = {"X-Error-Message": fault.message}
            if fault.code:
                headers["X-Error-Code"] = fault.code
            if fault.retry_after is not None:
                headers["Retry-After"] = str(fault.retry_after)
            content = json.dumps({"error": fault.message}).encode() if fault.content is None else fault.content
            self._reply(fault.status, {**headers, **fault.headers}, content)
            return True
        return False

    def _pour(self, fault: Fault) -> None:
        """A body without end; ends with the connection, or after a gigabyte."""
        self.send_response(200)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece = fault.content or b"0" * 65536
        try:
            if fault.prefix:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(fault.prefix), fault.prefix))
            while fault.sent_bytes < 2**30:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                fault.sent_bytes += len(piece)
        finally:
            self.close_connection = True

    def _cut(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        body, got = bytearray(int(self.headers.get("Content-Length") or 0)), 0
        started, rate = time.monotonic(), self.hub.bytes_per_s if self.command == "PUT" else None
        while got < len(body):
            num_bytes = self.rfile.readinto1(memoryview(body)[got : got + _PART_BYTES])
            if not num_bytes:
                raise ConnectionError
            got += num_bytes
            early_s = started + got / rate - time.monotonic() if rate else 0.0
            if early_s > _MIN_SLEEP_S:
                time.sleep(early_s)
        return bytes(body)

    def _reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub for tests.", epilog="python -m tests.hub.server --port 0")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--bytes-per-s", type=float, default=None, help="slow uploads down (plain HTTP transport)")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir or Path(tempfile.mkdtemp(prefix="hub-"))
    with HubServer(data_dir, arguments.port, arguments.bytes_per_s) as hub:
        print(hub.url, flush=True)
        print(f"token with write access: {WRITE_TOKEN}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
