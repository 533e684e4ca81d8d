"""What a node's agent tells the batch script about how the run ended. No Slurm is needed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.agent.machine import Verdict
from launcher.base.paths import RunPaths
from launcher.base.stop_requests import END_TIME
from launcher.slurm.node import _write_in_place, in_a_word, stop_reason


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "slurm").mkdir()
    return RunPaths(tmp_path)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(0, "nothing to do", state="finished"), ("finished", "")),
        (Verdict(75, "", state="pruned"), ("pruned", "")),
        (Verdict(75, "", state="interrupted", reason="preempted"), ("interrupted preempted", "")),
        (Verdict(75, "", state="interrupted", reason="stop_file"), ("interrupted stop_file", "")),
        (Verdict(2, "data.jsonl:3 is no JSON", state="failed"), ("failed 2", "data.jsonl:3 is no JSON")),
        (Verdict(1, "rank 0: boom", state="failed", reason="crash"), ("failed 1", "rank 0: boom")),
    ],
)
def test_script_is_told_in_a_word_when_run_has_ended(
    paths: RunPaths, verdict: Verdict, expected: tuple[str, str]
) -> None:
    assert in_a_word(verdict, paths) == expected


@pytest.mark.parametrize("reason", ["preempted", "time_limit", "signal", "stop_file"])
def test_job_is_not_requeued_for_ever_when_the_saves_of_its_stops_fail(paths: RunPaths, reason: str) -> None:
    told = "step 8 could not be saved: disk full. The steps after 5 are lost"

    def stopped(newest: int) -> str:
        for step in range(5, newest + 1, 5):
            paths.checkpoint_dir(step).mkdir(exist_ok=True)
            (paths.checkpoint_dir(step) / "manifest.json").touch()
        paths.run_state.write_text(json.dumps({"state": "interrupted", "reason": reason, "exit_code": 1, "step": 8}))
        word, text = in_a_word(Verdict(1, told, state="interrupted", reason=reason), paths)
        assert told in text
        return word

    assert stopped(5) == f"unsaved {reason}"
    assert json.loads(paths.run_state.read_text())["state"] == "interrupted"
    assert stopped(10) == f"unsaved {reason}", "a checkpoint has come since"
    assert stopped(10) == "failed 1"
    state = json.loads(paths.run_state.read_text())
    assert (state["state"], state["exit_code"], state["step"]) == ("failed", 1, 8)
    assert told in state["error"] and "no checkpoint has come since" in state["error"]


def test_job_ends_when_not_even_a_note_can_be_written(paths: RunPaths) -> None:
    paths.slurm_dir.rmdir()
    paths.slurm_dir.write_text("no folder")
    word, text = in_a_word(Verdict(1, "disk full", state="interrupted", reason="preempted"), paths)
    assert word == "failed 1"
    assert "disk full. Nothing can be written" in text


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=2026-11-27T09:00:00 ", "preempted"),
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=1795770000 ", "preempted"),
        ("JobId=7 JobState=COMPLETING Reason=TimeLimit PreemptTime=None ", "time_limit"),
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=None ", "signal"),
        ("", "signal"),
    ],
)
def test_reason_of_a_signal_is_what_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$4" = 7 ] && echo "{said}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert stop_reason("7") == reason


@pytest.mark.parametrize(("end_s", "reason"), [(-5, "time_limit"), (60, "signal"), (None, "signal")])
def test_reason_is_the_time_limit_when_nobody_answers_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end_s: int | None, reason: str
) -> None:
    """As on a busy machine, where scontrol gives up."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(END_TIME, "" if end_s is None else str(int(time.time()) + end_s))
    assert stop_reason("7") == reason


def test_agent_ends_in_silence_when_the_script_has_gone_on_without_it(tmp_path: Path) -> None:
    """srun may end before its tasks do."""
    _write_in_place(tmp_path / "verdict", "finished")
    assert not (tmp_path / "verdict").exists()


def test_signal_is_obeyed_when_there_is_no_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stop_reason("7") == "signal"
