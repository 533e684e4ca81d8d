"""A writer that has no time for it does not hold up the training."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.writer_client import SnapshotBuffer, WriterClient
from tests.distributed.runs import wait_until


def test_what_start_up_code_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hello'); print('no end of line', end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    buffer = SnapshotBuffer()
    buffer.reserve(4096, pin=False)
    client = WriterClient(buffer, {})
    client.start()
    client.send({"cmd": "discard", "step": 1, "dir": "/nonexistent"})
    answers: list[dict[str, Any]] = []
    wait_until(lambda: bool(answers.extend(client.poll(timeout_s=1.0)) or answers), "an answer", 300)
    client.stop()
    buffer.close()
    assert [answer["event"] for answer in answers] == ["discarded"]


def test_sending_does_not_wait_when_the_writer_does_not_read() -> None:
    buffer = SnapshotBuffer()
    buffer.reserve(4096, pin=False)
    client = WriterClient(buffer, {})
    client.start()
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wake_up = threading.Timer(20.0, os.kill, (pid, signal.SIGCONT))
    wake_up.start()
    started = time.monotonic()
    client.send({"cmd": "discard", "step": 1, "dir": "/nonexistent", "texts": {"trainer_state.json": "x" * 20_000_000}})
    took = time.monotonic() - started
    wake_up.cancel()
    os.kill(pid, signal.SIGCONT)
    assert client.poll(timeout_s=300.0)[0]["event"] == "discarded"
    client.stop()
    buffer.close()
    assert took < 10.0
