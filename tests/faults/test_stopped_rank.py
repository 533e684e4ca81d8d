"""A rank that a signal stopped: it is said, a stop is obeyed, and it is no hang in silence, whatever it was doing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.agent import stopped
from launcher.agent.stopped import StoppedProcesses
from launcher.base import manifest
from tests.distributed.runs import Lab, settings, wait_until, write_rows
from tests.distributed.zygote import ROOT
from tests.faults.launches import Launch, launched

_PHASES = {
    "mid-training": ("tests.step", r"\(4,"),
    "publication": ("os.rename", r"/run/\.model\.safetensors\.tmp-\w+'.*/run/model\.safetensors'"),
}


@contextmanager
def _child(*words: str) -> Iterator[int]:
    code = "import sys, time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_stopped_processes_are_told_and_a_request_to_stop_lets_them_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(stopped.time, "monotonic", lambda: clock[0])
    with _child("-m", "launcher.train") as rank, _child("other") as other:
        watched = StoppedProcesses(os.getpid(), 30.0)

        def look(at_s: float, *, is_stop_asked: bool = False) -> bool:
            clock[0] = at_s
            return watched.look(lambda: is_stop_asked)

        assert not look(0.0)
        for pid in (rank, other):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: _state(pid) == "T", "the stop")  # type: ignore[misc]
        assert not look(10.0) and not watched.at_the_end()
        assert capsys.readouterr().err == ""
        assert not look(20.0)
        told = capsys.readouterr().err
        assert f"rank 0 (pid {rank})" in told and f"kill -CONT {rank}" in told and f"(pid {other})" in told
        assert watched.at_the_end() == {0: rank}
        assert look(45.0)  # stopped for more than 30 s
        assert not look(50.0, is_stop_asked=True)
        wait_until(lambda: _state(rank) != "T" and _state(other) != "T", "SIGCONT")
        assert not look(60.0) and not look(80.0) and not watched.at_the_end()


def test_a_fork_that_waits_to_become_a_rank_is_taken_for_one() -> None:
    """They become ranks in the order in which they were made."""
    code = "import os, time\nfor _ in '12':\n    if os.fork() == 0: time.sleep(60)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as root:
        try:
            assert root.stdout is not None
            root.stdout.readline()
            first, second = map(int, Path(f"/proc/{root.pid}/task/{root.pid}/children").read_text().split())
            watched = StoppedProcesses(root.pid, 0.0, first_rank=4)
            os.kill(second, signal.SIGSTOP)
            wait_until(lambda: _state(second) == "T", "the stop")
            assert not watched.look(lambda: False)
            wait_until(lambda: watched.look(lambda: False), "the limit", 30)
            assert watched.at_the_end() == {5: second} and first != second
        finally:
            os.killpg(root.pid, signal.SIGKILL)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def _run_with_a_stopped_rank(folder: Path, phase: str, num_processes: int, *more: str) -> Iterator[Launch]:
    """Stopped by itself when it comes to the phase, on the main process."""
    write_rows(folder / "rows.jsonl")
    event, match = _PHASES[phase]
    held = {"event": event, "match": match, "seconds": 0, "reached": str(folder / "reached"), "signal": signal.SIGSTOP}
    overrides = [
        *settings(folder / "rows.jsonl", folder / "cache"), f"strategy={'ddp' if num_processes > 1 else 'single'}",
        f"launch.num_processes={num_processes}", "train.max_steps=10", "checkpoint.save_steps=5", *more,
    ]  # fmt: skip
    env = {"PHASE": json.dumps(held), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "phases"), str(ROOT)])}
    with launched(overrides, folder / "run", env) as run:
        wait_until(lambda: "is stopped by a signal" in run.text(), "a word on it", 120.0)
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("phase", _PHASES)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_stop_is_obeyed_when_a_rank_is_stopped_by_a_signal(tmp_path: Path, phase: str, num_processes: int) -> None:
    with _run_with_a_stopped_rank(tmp_path, phase, num_processes) as run:
        os.kill(run.process.pid, signal.SIGTERM)
        started = time.monotonic()
        code = run.wait(60)
        assert time.monotonic() - started < 20.0
    assert code == (0 if phase == "publication" else 75), run.text()
    assert run.run_state()["state"] == ("finished" if phase == "publication" else "interrupted")
    newest = max(run.paths.checkpoint_dirs())[1]
    assert manifest.verify(newest) == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", _PHASES)
@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_run_starts_again_when_a_rank_stays_stopped(lab: Lab, tmp_path: Path, phase: str, num_processes: int) -> None:
    with _run_with_a_stopped_rank(tmp_path, phase, num_processes, "launch.hang_timeout_s=15") as run:
        assert run.wait(120) == 0, run.text()
    assert "stopped by a signal (SIGSTOP, Ctrl-Z), and nothing let it go on" in run.text()
    assert "(1 of " in run.text() and "(2 of " not in run.text()
    assert run.run_state()["state"] == "finished" and manifest.verify(run.paths.checkpoint_dir(10)) == []
    assert (run.paths.root / "model.safetensors").read_bytes() == (
        run.paths.checkpoint_dir(10) / "model.safetensors"
    ).read_bytes()
    assert not list(run.paths.root.glob(".*.tmp-*"))
