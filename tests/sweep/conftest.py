"""The sweep fixture."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweep.runner import SweepRunner


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[SweepRunner]:
    runner = SweepRunner(tmp_path / "sweep")
    yield runner
    for process in runner.started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
