"""Never two runs in one output_dir: real processes that race for the lock, also in two PID namespaces.

Defends CONTRACT.md, "Processes and exit codes": the lock, and that a second run on a live folder exits 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import lock_file
from tests.distributed.runs import wait_until
from tests.distributed.zygote import ROOT, environment

_KINDS = ("none", "stale", "claimed", "empty", "elsewhere")
_HOLD = """
import os, sys, time
from pathlib import Path
from launcher.base import lock, lock_file
lock_file.STALE_S, lock.HEARTBEAT_S = float(sys.argv[2]), 0.2
mine = lock.RunLock(Path(sys.argv[1]))
mine.on_lost = lambda error: print(error, flush=True)
try:
    mine.acquire([os.getpid()])
except lock_file.RunLockedError as error:
    print(error, flush=True)
    sys.exit(2)
print("mine", os.getpid(), flush=True)
sys.stdin.readline()
mine.release()
"""


def _race(folder: Path, tries: int, links: str, kind: str) -> None:
    arguments = [str(folder), str(tries), "5", links, kind]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lock_race", *arguments], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == tries
    for result in results:
        assert 0 in result["codes"] and set(result["codes"]) <= {0, 2}, result
        assert result["left"] == [], result


@pytest.mark.parametrize("links", ["yes", "no"])
@pytest.mark.parametrize("kind", _KINDS)
def test_one_starter_gets_the_lock_when_several_race_for_it(kind: str, links: str, tmp_path: Path) -> None:
    _race(tmp_path, 3, links, kind)


@pytest.mark.slow
@pytest.mark.parametrize("links", ["yes", "no"])
@pytest.mark.parametrize("kind", _KINDS)
def test_one_starter_gets_the_lock_in_each_of_a_hundred_races(kind: str, links: str, tmp_path: Path) -> None:
    _race(tmp_path, 100, links, kind)


@contextlib.contextmanager
def _holder(path: Path, *prefix: str, stale_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", _HOLD, str(path), str(stale_s)], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def _can_unshare() -> bool:
    return subprocess.run([*_CONTAINER, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_unshare(), reason="needs root, or user namespaces")
@pytest.mark.parametrize("second_prefix", [(), _CONTAINER], ids=["on the machine", "in another container"])
def test_second_run_is_refused_when_the_first_is_in_a_container_of_the_same_name(
    second_prefix: tuple[str, ...], tmp_path: Path
) -> None:
    """Both see the other's pids as dead, or as some other process."""
    path = tmp_path / ".lock"
    with _holder(path, *_CONTAINER) as first:
        assert _line(first) == "mine 1"  # pid 1 of its own namespace: init on the machine, and the second container's
        with _holder(path, *second_prefix) as second:
            assert _line(second).startswith(f"output_dir={tmp_path} is in use by a run on host")
            assert second.wait(60) == 2
        first.stdin.write("\n")  # type: ignore[union-attr]
        first.stdin.flush()  # type: ignore[union-attr]
        assert first.wait(60) == 0
        assert not path.exists()


@pytest.mark.skipif(not _can_unshare(), reason="needs root, or user namespaces")
def test_lock_of_a_dead_container_is_taken_when_its_heartbeat_stands_still(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with _holder(path, *_CONTAINER) as first:
        assert _line(first) == "mine 1"
    with _holder(path, stale_s=2.0) as second:
        assert _line(second) == f"mine {second.pid}"


@pytest.mark.skipif(not _can_unshare(), reason="needs root, or user namespaces")
def test_holder_that_stood_still_ends_when_it_finds_that_its_lock_was_taken(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with _holder(path, *_CONTAINER) as first:
        assert _line(first) == "mine 1"
        found = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True)
        pid = int(found.stdout)
        os.kill(pid, signal.SIGSTOP)
        with _holder(path, stale_s=1.0) as second:
            assert _line(second) == f"mine {second.pid}"
            os.kill(pid, signal.SIGCONT)
            assert f"taken over by a run on host {os.uname().nodename}, pid {second.pid}" in _line(first)
            first.stdin.write("\n")  # type: ignore[union-attr]
            first.stdin.flush()  # type: ignore[union-attr]
            assert first.wait(60) == 0
            mine = lock_file.read(path)
            assert mine is not None and mine.pid == second.pid


def test_lock_is_not_taken_when_its_holder_is_stopped_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with _holder(path) as first:
        assert _line(first) == f"mine {first.pid}"
        os.kill(first.pid, signal.SIGSTOP)
        began = time.monotonic()
        with _holder(path, stale_s=0.1) as second:
            assert f"pid {first.pid}" in _line(second)
            assert second.wait(60) == 2
        assert time.monotonic() - began < 20
        os.kill(first.pid, signal.SIGCONT)
        wait_until(lambda: lock_file.read(path) is not None, "the lock", 60)
