"""The snapshot buffer where CUDA copies into it. No CUDA here: the calls of its runtime are noted instead."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.checkpoint import writer_client
from launcher.checkpoint.writer_client import SnapshotBuffer


class Runtime:
    """Keeps what cudaHostRegister and cudaHostUnregister are asked for; refuses more than `limit` bytes."""

    cudaError = types.SimpleNamespace(success=0)

    def __init__(self, limit: int) -> None:
        self.limit, self.registered, self.calls = limit, dict[int, int](), list[str]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append("register")
        if size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    made, kernels = Runtime(2**16), list[Any]()
    monkeypatch.setattr(writer_client, "_cudart", lambda: made)
    monkeypatch.setattr(writer_client.torch, "ones", lambda *args, **kwargs: kernels.append(args))
    yield made
    assert len(kernels) == made.calls.count("register") - made.calls.count("unregister")


def test_old_range_is_unregistered_before_the_buffer_grows_and_at_the_end(runtime: Runtime) -> None:
    buffer = SnapshotBuffer()
    assert buffer.reserve(4096, pin=True) and buffer.is_pinned
    assert not buffer.reserve(100, pin=True)
    assert buffer.reserve(8192, pin=True) and list(runtime.registered.values()) == [8192]
    buffer.close()
    assert runtime.calls == ["register", "unregister", "register", "unregister"] and not runtime.registered


def test_buffer_is_used_unpinned_when_cuda_refuses(runtime: Runtime) -> None:
    """And the error that CUDA keeps is taken, so that no later kernel is blamed for it."""
    buffer = SnapshotBuffer()
    assert buffer.reserve(2**20, pin=True) and not buffer.is_pinned
    buffer.tensor.fill_(7)
    buffer.close()
    assert runtime.calls == ["register"]
