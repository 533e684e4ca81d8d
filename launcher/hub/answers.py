"""What an endpoint's answers may do: bring as many bytes as were declared, and name commits and files by their hashes.

The client takes hashes of an answer for names of files (`blobs/ETAG`, `snapshots/COMMIT`), reads every body to its end,
and unpacks compressed ones; an endpoint that is not the Hub could use each of it. Standard library only; the types of
the HTTP library are the client's.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

MAX_ANSWER_BYTES = 64 * 2**20
"""Of one answer where nothing was declared: lists and descriptions."""
MAX_ENTRIES = 1_000_000
SLACK_BYTES = 16 * 2**20
T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_ETAG = re.compile(r'(W/)?"?[A-Za-z0-9_+=.-]{1,256}"?')
_INFO_PATH = re.compile(r"/api/(models|datasets)/[^/]+(/[^/]+)?(/revision/.+)?$")
_UNPACK_BYTES = 2**16


class EndpointError(Exception):
    """The endpoint answers what the Hub would not; trying again does not help."""


class _Allowance:
    """Bytes that the answers of all threads may still bring."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> None:
        with self._lock:
            self._left -= num_bytes
            if self._left < 0:
                raise EndpointError("the endpoint sends more bytes than it declared")


_downloads: _Allowance | None = None


@contextmanager
def expecting(num_bytes: int) -> Iterator[None]:
    """Inside of it all answers together may bring these bytes: twice, as a cut download may begin again."""
    global _downloads
    _downloads = _Allowance(2 * num_bytes + SLACK_BYTES)
    try:
        yield
    finally:
        _downloads = None


def counted(entries: Iterable[T]) -> Iterator[T]:
    """A list that comes in pages, each of which may name a next one.

    Raises:
        EndpointError: it has no end.
    """
    for number, entry in enumerate(entries):
        if number >= MAX_ENTRIES:
            raise EndpointError(f"the endpoint lists more than {MAX_ENTRIES} files")
        yield entry


def is_commit_id(value: Any) -> bool:
    return isinstance(value, str) and bool(_COMMIT.fullmatch(value))


def check_answer(response: Any) -> None:
    """For the client's hook on every answer, before its body is read.

    Raises:
        EndpointError: a hash is none. It, or an error of the body's, also while the body is read later.
    """
    headers = response.headers
    commit = headers.get("X-Repo-Commit")
    if commit is not None and not is_commit_id(commit):
        raise EndpointError(f"the endpoint names {commit!r} as a commit")
    if response.request.method == "HEAD":
        etag = headers.get("X-Linked-Etag") or headers.get("ETag")  # which of the two the client takes
        if "/resolve/" in response.request.url.path and etag is not None and not _ETAG.fullmatch(etag):
            raise EndpointError(f"the endpoint names {etag!r} as the hash of a file")
        return
    _bound(response)
    if response.request.method == "GET" and response.status_code == 200:
        path = response.request.url.path
        if _INFO_PATH.search(path):
            _check_info(response)


def _check_info(response: Any) -> None:
    """The `sha` of a repository becomes the name of a folder."""
    try:
        info = json.loads(response.read())
    except (ValueError, RecursionError):
        raise EndpointError("the endpoint describes a repository by what is no JSON") from None
    sha = info.get("sha") if isinstance(info, dict) else None
    if sha is not None and not is_commit_id(sha):
        raise EndpointError(f"the endpoint names {sha!r} as a commit")


def _bound(response: Any) -> None:
    stream, allowance = response.stream, _downloads or _Allowance(MAX_ANSWER_BYTES)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", ""):
        raise EndpointError(f"the endpoint answers in Content-Encoding: {encoding}, which was not asked for")
    if encoding == "gzip":  # here and not in the client, which would unpack without a bound
        for name in ("Content-Encoding", "Content-Length"):
            response.headers.pop(name, None)

    class Bounded(type(stream)):  # type: ignore[misc]  # the client checks for the stream's class
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            for chunk in _unpacked(stream) if encoding == "gzip" else stream:
                allowance.take(len(chunk))
                yield chunk

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()


def _unpacked(stream: Any) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        for chunk in stream:
            data = chunk
            while data:
                yield unpacker.decompress(data, _UNPACK_BYTES)
                data = unpacker.unconsumed_tail
            if unpacker.eof:  # what follows would be ignored, without an end
                return
        yield unpacker.flush()
    except zlib.error as error:
        raise EndpointError(f"the endpoint's answer cannot be unpacked: {error}") from None
