"""What the batch script is told about a start of the ranks, and what run.json says afterwards. No Slurm is needed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.slurm.outcome import judge


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "logs").mkdir()
    (tmp_path / "errors").mkdir()
    return RunPaths(tmp_path)


def verdict(paths: RunPaths, code: int = 1) -> str:
    return judge(paths, attempt="7-0-0", began=time.time() - 60, code=code, error_dir=paths.root / "errors")[0]


def write_run(paths: RunPaths, **fields: Any) -> None:
    paths.run_state.write_text(json.dumps({"attempt": "7-0-0", "reason": None, "step": 3} | fields), encoding="utf-8")


def write_error(paths: RunPaths, *, rank: int = 0, seconds: float = 0.0, **fields: Any) -> None:
    report = {"rank": rank, "time": seconds, "exit_code": 1, "kind": "RuntimeError", "is_ours": False}
    (paths.root / "errors" / f"error-rank-{rank}.json").write_text(
        json.dumps(report | {"message": "boom"} | fields), encoding="utf-8"
    )


def run_json(paths: RunPaths) -> dict[str, Any]:
    return dict(json.loads(paths.run_state.read_text()))


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("finished", None, "finished"),
        ("pruned", None, "pruned"),
        ("interrupted", "preempted", "interrupted preempted"),
        ("interrupted", "stop_file", "interrupted stop_file"),
    ],
)
def test_run_json_is_the_authority_whatever_srun_says(paths: RunPaths, state: str, reason: str, expected: str) -> None:
    write_run(paths, state=state, reason=reason)
    assert verdict(paths, code=0) == verdict(paths, code=1) == expected


def test_earlier_starts_ending_is_not_taken_for_this_ones(paths: RunPaths) -> None:
    write_run(paths, state="interrupted", reason="preempted", attempt="7-0-9")
    assert verdict(paths) == "crashed"


def test_finished_run_stays_finished_when_started_again(paths: RunPaths) -> None:
    write_run(paths, state="finished", attempt="older")
    assert verdict(paths, code=0) == "finished"
    assert run_json(paths)["attempt"] == "older"


def test_kill_is_a_crash_in_run_json(paths: RunPaths) -> None:
    write_run(paths, state="running")
    assert verdict(paths, code=137) == "crashed"
    assert (run_json(paths)["state"], run_json(paths)["reason"], run_json(paths)["step"]) == ("failed", "crash", 3)


def test_crash_before_training_began_is_in_run_json_too(paths: RunPaths) -> None:
    write_error(paths, where="/x/metric.py:7 in score")
    verdict, text = judge(paths, attempt="7-0-0", began=time.time(), code=1, error_dir=paths.root / "errors")
    assert verdict == "crashed" and text.startswith("rank 0: RuntimeError: boom\n  at /x/metric.py:7 in score\n")
    assert run_json(paths)["state"] == "failed" and "boom" in run_json(paths)["error"]


def test_error_of_the_users_is_not_restarted(paths: RunPaths) -> None:
    write_error(paths, is_ours=True, exit_code=2, message="data.jsonl:3 is no JSON")
    assert verdict(paths) == "failed 2"
    assert (run_json(paths)["reason"], run_json(paths)["exit_code"]) == (None, 2)


def test_hang_is_named_when_stacks_were_written(paths: RunPaths) -> None:
    write_run(paths, state="running")
    paths.stacks(1).write_text("Thread 0x1", encoding="utf-8")
    assert verdict(paths) == "crashed"
    assert run_json(paths)["reason"] == "hang"


def test_stacks_of_an_earlier_start_are_no_hang(paths: RunPaths) -> None:
    write_run(paths, state="running")
    paths.stacks(1).write_text("Thread 0x1", encoding="utf-8")
    os.utime(paths.stacks(1), (time.time() - 3600,) * 2)
    assert verdict(paths) == "crashed"
    assert run_json(paths)["reason"] == "crash"


def test_killed_while_stopping_counts_as_stopped(paths: RunPaths) -> None:
    write_run(paths, state="running")
    paths.stop_file.write_text("preempted", encoding="utf-8")
    assert verdict(paths) == "interrupted preempted"
    assert (run_json(paths)["state"], run_json(paths)["reason"]) == ("interrupted", "preempted")
    assert not paths.stop_file.exists()


@pytest.mark.parametrize("reason", ["preempted", "time_limit", "signal", "stop_file"])
def test_job_is_not_requeued_for_ever_when_the_saves_of_its_stops_fail(paths: RunPaths, reason: str) -> None:
    (paths.root / "slurm").mkdir()
    told = "step 8 could not be saved: disk full. The steps after 5 are lost"

    def stopped(newest: int) -> str:
        for step in range(5, newest + 1, 5):
            paths.checkpoint_dir(step).mkdir(exist_ok=True)
            (paths.checkpoint_dir(step) / "manifest.json").touch()
        write_run(paths, state="interrupted", reason=reason, exit_code=1, error=told)
        return verdict(paths)

    assert stopped(5) == f"unsaved {reason}"
    assert run_json(paths)["state"] == "interrupted"
    assert stopped(10) == f"unsaved {reason}", "a checkpoint has come since"
    assert stopped(10) == "failed 1"
    state = run_json(paths)
    assert (state["state"], state["exit_code"]) == ("failed", 1) and told in state["error"]
    assert "no checkpoint has come since" in state["error"]


def test_job_ends_when_not_even_a_note_can_be_written(paths: RunPaths) -> None:
    write_run(paths, state="interrupted", reason="preempted", exit_code=1, error="disk full")
    (paths.root / "slurm").write_text("no folder")
    assert verdict(paths) == "failed 1"
    assert "disk full. Nothing can be written" in run_json(paths)["error"]
