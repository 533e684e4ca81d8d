"""A writer that stands still, stopped by a signal or in a disk that does not answer, holds nothing up: promise 1.

What it leaves is a save that failed: it is said, and repeated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from launcher.checkpoint import writer_client
from launcher.checkpoint.engine import Phase
from launcher.checkpoint.save_result import SaveResult
from tests.distributed.runs import Lab, different, lines, log_text, wait_until
from tests.faults.launches import descendants
from tests.faults.writer_group import Group


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_client, "_STOPPED_S", 0.5)


def _stop_writer(group: Group, member: int, patience_s: float | None = None) -> int:
    """
    Args:
        patience_s: of the member, with this writer. Those that go on may get no core for longer on a busy machine.
    """
    pid = group.members[member].writer_pid
    if patience_s is not None:
        group.members[member]._hang_timeout_s = patience_s
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


def _result_and_longest_tick(group: Group) -> tuple[SaveResult, float]:
    """Of the save in flight; a tick is what each training step does."""
    longest = 0.0
    result = None
    while result is None:
        started = time.monotonic()
        result = group.tick()
        longest = max(longest, time.monotonic() - started)
        time.sleep(0.01)
    return result, longest


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[list[Group]]:
    made: list[Group] = []
    yield made
    for group in made:
        group.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_training_goes_on_and_the_writer_is_replaced_after_the_timeout_when_it_was_stopped(
    groups: list[Group], tmp_path: Path, victim: int
) -> None:
    group = Group(tmp_path, 2)
    groups.append(group)
    group.save(1)
    assert group.finish().error is None
    pid = _stop_writer(group, victim, patience_s=2.0)
    group.save(2)
    result, longest = _result_and_longest_tick(group)
    group.members[victim]._hang_timeout_s = 600.0
    assert longest < 1.9, "a step waited for the writer"
    assert result.error is not None and f"writer process {pid} stood still" in result.error
    group.save(3)
    assert group.finish().error is None
    assert [s for s, f in group.paths.checkpoint_dirs() if manifest.verify(f) == []] == [1, 3]
    assert group.members[victim].writer_pid != pid


def test_no_step_waits_when_a_killed_writer_does_not_die(
    groups: list[Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it hangs in a file system: the kernel kills it when that answers."""
    group = Group(tmp_path, 1)
    groups.append(group)
    group.save(1)
    assert group.finish().error is None
    pid = _stop_writer(group, 0, patience_s=2.0)
    waits: list[float | None] = []
    really_wait = subprocess.Popen.wait

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        waits.append(timeout)
        return really_wait(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "kill", lambda self: None)
        patch.setattr(subprocess.Popen, "wait", wait)
        group.save(2)
        _result_and_longest_tick(group)
    group.members[0]._hang_timeout_s = 600.0
    assert waits and None not in waits and sum(filter(None, waits)) < 0.5, "a step waited for the writer"
    group.save(3)
    assert group.finish().error is None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("state", "stands_still"), [("R", False), ("S", True), ("D", True), ("T", True)])
def test_a_process_does_not_stand_still_when_it_waits_for_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, stands_still: bool
) -> None:
    """A writer gets one only where nobody else wants it; its time on a core stands still until then."""
    clock = [0.0]
    monkeypatch.setattr(writer_client.time, "monotonic", lambda: clock[0])
    activity = writer_client.Activity(os.getpid())
    activity._folder = tmp_path
    (tmp_path / "stat").write_text(f"7 (python) {state} {' '.join('1' * 40)}")
    activity.standstill_s()
    clock[0] = 100.0
    assert activity.standstill_s() == (100.0 if stands_still else 0.0)


def test_a_wait_ends_at_once_when_somebody_asks_for_a_stop(groups: list[Group], tmp_path: Path) -> None:
    group = Group(tmp_path, 1, hang_timeout_s=600.0)
    groups.append(group)
    (member,) = group.members
    group.save(1)
    assert group.finish().error is None
    pid = _stop_writer(group, 0)
    group.save(2)
    assert member.wait() is None and member.phase is not Phase.IDLE, "training does not wait for a writer that stands"
    result = member.wait(is_urgent=lambda: True)
    assert result is not None and result.error is not None and str(pid) in result.error
    group.save(2)
    assert group.finish().error is None, "the second attempt at the same step"
    assert [s for s, _ in group.paths.checkpoint_dirs()] == [1, 2]


def test_a_run_ends_when_its_writer_was_stopped_with_nothing_to_do(groups: list[Group], tmp_path: Path) -> None:
    group = Group(tmp_path, 1)
    group.save(1)
    assert group.finish().error is None
    _stop_writer(group, 0)
    started = time.monotonic()
    group.members[0].close()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_second_attempt_is_whole_when_the_first_is_still_being_discarded(
    groups: list[Group], tmp_path: Path, count: int
) -> None:
    """At a stop the same step is saved again at once; nobody waits for the discard of what failed."""
    group = Group(tmp_path, count)
    groups.append(group)
    group.save(0)
    assert group.finish().error is None
    for step in range(1, 8):
        victim = _stop_writer(group, step % count)  # else it might have written, and another one committed, by then
        group.save(step)
        os.kill(victim, signal.SIGKILL)
        first = group.finish()
        group.save(step)
        result = group.finish()
        assert first.error is not None and result.error is None, f"step {step}: {result.error}"
        assert manifest.verify(group.paths.checkpoint_dir(step)) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("strategy", "count", "victim"), [("zero2", 2, 1), pytest.param("ddp", 3, 0, marks=pytest.mark.slow)]
)
def test_a_stop_is_obeyed_and_saves_when_a_writer_stands_still(
    lab: Lab, tmp_path: Path, strategy: str, count: int, victim: int
) -> None:
    """SIGSTOP for the writer of one rank; steps go on past the next due save; SIGTERM saves and ends with 0."""
    more = ("train.max_steps=120", "checkpoint.save_steps=20", "train.logging_steps=1")
    slow = {"FAULTS": json.dumps([{"kind": "sleep", "seconds": 0.05}])}
    run = RunPaths(tmp_path / "run")
    pids = lab.start(run.root, strategy, count, *more, env=slow)
    wait_until(lambda: run.checkpoint_dir(20).exists(), "checkpoint-20")
    (writer,) = [p for p in descendants(pids[victim]) if b"launcher.checkpoint.writer" in _command(p)]
    os.kill(writer, signal.SIGSTOP)
    wait_until(lambda: "stands still" in log_text(run.root), "the notice of a save that was not begun")
    reached = max(lines(run))
    wait_until(lambda: max(lines(run)) >= reached + 5, "further steps")
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert lab.zygote.wait() == [0] * count, log_text(run.root)
    state = files.read_json(run.run_state)
    assert (state["state"], state["reason"]) == ("interrupted", "signal")
    newest, folder = list(run.checkpoint_dirs())[-1]
    assert newest == state["step"] and manifest.verify(folder) == []
    plain = lab.run(tmp_path / "plain", strategy, count, *more)
    lab.run(run.root, strategy, count, *more)
    assert different(plain.checkpoint_dir(120), run.checkpoint_dir(120)) == []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
