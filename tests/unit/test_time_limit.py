"""The stop before the job's end: save_s + step_s + 60 s, also while no save has been measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base.stop_requests import END_TIME, REASONS, StopRequests
from launcher.config.settings import RunConfig
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.train.metrics import MetricsFile


@pytest.mark.parametrize(("left_s", "reason"), [(95.0, "time_limit"), (105.0, None)])
def test_stop_comes_a_minute_and_a_save_and_a_step_before_the_end(
    left_s: float, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(END_TIME, str(time.time() + left_s))
    code = StopRequests(tmp_path / "STOP", is_main=True).reason_code(save_s=30.0, step_s=10.0)
    assert code == (1 + REASONS.index(reason) if reason else 0)


@pytest.mark.parametrize("end", ["", None])
def test_nothing_stops_a_job_whose_end_is_not_known(
    end: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv(END_TIME, raising=False) if end is None else monkeypatch.setenv(END_TIME, end)
    assert StopRequests(tmp_path / "STOP", is_main=True).reason_code(save_s=30.0, step_s=10.0) == 0


def saver_of(folder: Path, num_bytes: int) -> Saver:
    unused: Any = None
    outlet: Any = MetricsFile(folder / "metrics.jsonl")
    checkpointer: Any = SimpleNamespace(plan=SimpleNamespace(total_bytes=num_bytes))
    config = RunConfig()
    return Saver(
        config, unused, unused, unused, checkpointer, unused, lock=unused, schedule=SaveSchedule(config, 64),
        outlet=outlet, hub=unused, alive=unused, is_stopping=unused, is_judged_later=unused, total_steps=100,
        saved_step=0,
    )  # fmt: skip


def test_save_is_expected_to_take_as_long_as_the_last_one_of_an_earlier_start(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [{"step": 5, "save_write_s": 9.0}, {"step": 10, "save_write_s": 7.5}, {"step": 11}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saver_of(tmp_path, 10**12).expected_s() == 7.5


def test_first_save_is_expected_to_take_time_by_its_size(tmp_path: Path) -> None:
    assert saver_of(tmp_path, 100 * 10**9).expected_s() == 500.0
    assert saver_of(tmp_path, 5 * 10**6).expected_s() < 0.1
