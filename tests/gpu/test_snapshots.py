"""The copy of a save on CUDA: pinned host memory, a stream beside the training's."""

from __future__ import annotations

import torch

from launcher.checkpoint import snapshot
from launcher.checkpoint.snapshot import Copy
from launcher.checkpoint.writer_client import SnapshotBuffer


def test_copies_are_right_when_the_buffer_grows() -> None:
    buffer = SnapshotBuffer()
    for numel in (2**20, 2**24, 2**26):
        source = torch.randn(numel, device="cuda")
        assert buffer.reserve(numel * 4, pin=True)
        assert buffer.is_pinned
        snapshot.take([Copy(lambda s=source: s, 0, numel, 0, torch.float32)], buffer.tensor)
        torch.cuda.synchronize()
        assert buffer.tensor.view(torch.float32).equal(source.cpu())
    buffer.close()
    assert not bool(torch.isnan(torch.randn(8, device="cuda").sum()))  # no error is left behind


def test_training_goes_on_when_memory_cannot_be_pinned(monkeypatch: object) -> None:
    import pytest

    assert isinstance(monkeypatch, pytest.MonkeyPatch)
    buffer = SnapshotBuffer()
    assert buffer.reserve(2**20, pin=True)
    first = buffer.tensor
    runtime = torch.cuda.cudart()
    # Registered twice: CUDA refuses, as it does beyond the limit of locked memory.
    assert runtime.cudaHostRegister(first.data_ptr(), first.numel(), 0) != runtime.cudaError.success
    from launcher.checkpoint import writer_client

    assert not writer_client._pin(first)
    assert float(torch.ones(4, device="cuda").sum()) == 4.0
    buffer.close()
