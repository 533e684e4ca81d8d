"""The watchdog: never less time than was asked for, at little more, and hardly any work in a step."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.train.watchdog import Watchdog


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ends_at, self.num_armed = 100.0, None, 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(faulthandler, "dump_traceback_later", self._arm)
        monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", self._cancel)

    def _arm(self, timeout: float, **_: Any) -> None:
        self.ends_at, self.num_armed = self.now + timeout, self.num_armed + 1

    def _cancel(self) -> None:
        self.ends_at = None


@pytest.mark.parametrize("timeout_s", [0.5, 5.0, 1800.0])
@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.3, 10.0])
def test_time_is_started_anew_at_most_once_a_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timeout_s: float, step_s: float
) -> None:
    clock = Clock(monkeypatch)
    watchdog = Watchdog(tmp_path / "stacks.txt", timeout_s)
    for _ in range(500):
        watchdog.alive()
        assert clock.ends_at is not None
        assert timeout_s - 1e-9 <= clock.ends_at - clock.now <= timeout_s + min(1.0, timeout_s / 10) + 1e-9
        clock.now += step_s
    assert clock.num_armed <= 500 * step_s / min(1.0, timeout_s / 10) + 1 or step_s >= 0.05
    watchdog.pause()
    assert clock.ends_at is None
    watchdog.alive()
    assert clock.ends_at is not None
    watchdog.close()
