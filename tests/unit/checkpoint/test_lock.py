"""One run per output_dir."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.base import lock as lock_module
from launcher.base.errors import RunLockedError
from launcher.base.lock import RunLock, holder
from launcher.base.process import host, start_ticks


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "DYING_S", 0.3)


def test_a_live_holder_is_named_and_keeps_the_lock(tmp_path: Path) -> None:
    first, path = RunLock(tmp_path / ".lock"), tmp_path / ".lock"
    first.acquire([os.getpid()])
    with pytest.raises(RunLockedError, match=f"host {host()}, pid {os.getpid()}") as caught:
        RunLock(path).acquire([os.getpid()])
    assert caught.value.exit_code == 2
    first.release()
    assert not path.exists() and list(tmp_path.iterdir()) == []
    second = RunLock(path)
    second.acquire([os.getpid()])
    second.release()


def test_a_lock_of_dead_processes_is_stale(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": host(), "pid": child.pid, "pids": [[child.pid, start_ticks(child.pid)]]}))
    assert holder(path) is not None
    child.communicate(b"\n")
    assert holder(path) is None
    taken = RunLock(path)
    taken.acquire([os.getpid()])
    taken.release()


def test_a_pid_that_was_given_to_another_process_is_no_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": host(), "pid": os.getpid(), "pids": [[os.getpid(), 1]]}))
    assert holder(path) is None


def test_any_living_rank_holds_it_although_the_main_one_is_dead(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    pids = [[2**22 - 1, 1], [os.getpid(), start_ticks(os.getpid())]]
    path.write_text(json.dumps({"host": host(), "pid": 2**22 - 1, "pids": pids}))
    assert holder(path) is not None


def test_the_heartbeat_decides_on_another_host(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job_id": "42", "pids": [[7, 7]]}))
    with pytest.raises(RunLockedError, match="host elsewhere, pid 7, job 42"):
        RunLock(path).acquire([os.getpid()])
    old = time.time() - lock_module.STALE_S - 1
    os.utime(path, (old, old))
    assert holder(path) is None
    mine = RunLock(path)
    mine.acquire([os.getpid()])
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))  # that one was not dead after all, and took it back
    mine.release()
    assert path.exists()


def test_an_unreadable_lock_is_honoured_until_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("")
    assert holder(path) is not None
    old = time.time() - lock_module.STALE_S - 1
    os.utime(path, (old, old))
    assert holder(path) is None


def test_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    """All of them find it stale at the same moment."""
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": host(), "pid": 1, "pids": []}))
    code = (
        "import sys, os; from pathlib import Path; from launcher.base import lock; lock.DYING_S = 0.0\n"
        "sys.stdin.readline()\n"
        "try: lock.RunLock(Path(sys.argv[1])).acquire([os.getpid()]); print('mine', flush=True); sys.stdin.readline()\n"
        "except lock.RunLockedError: print('refused', flush=True)\n"
    )
    root = Path(__file__).resolve().parents[3]
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
        )
        for _ in range(6)
    ]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write(b"go\n")
        starter.stdin.flush()
    answers = []
    for starter in starters:
        assert starter.stdout is not None
        answers.append(starter.stdout.readline().decode().strip())
    for starter in starters:
        starter.communicate(b"\n")
    assert sorted(answers) == ["mine", *["refused"] * 5]
