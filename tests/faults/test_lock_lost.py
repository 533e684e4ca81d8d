"""A run that stood still while another one took its output_dir over keeps nothing any more: promises 1 and 4."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import files, manifest
from launcher.base.lock import RunLock
from tests.distributed.runs import Lab, kill, log_text, wait_until
from tests.faults.writer_group import Group

_SLOW = {"FAULTS": json.dumps([{"kind": "sleep", "seconds": 0.05}])}


def take_over(lock: Path) -> str:
    """Puts another run's lock in the place of the one that is there, in one step. Returns its text."""
    text = lock.read_text()
    found = json.loads(text)
    other = text.replace(found["id"], "0123456789abcdef")
    new = lock.with_name("other-lock")
    new.write_text(other)
    new.rename(lock)
    return other


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    held = RunLock(tmp_path / ".lock")
    held.acquire([os.getpid()])
    yield held
    held.release()


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_committed_discarded_or_deleted_when_the_lock_is_lost(
    lock: RunLock, tmp_path: Path, count: int, is_async: bool
) -> None:
    group = Group(tmp_path, count, is_async=is_async, fence=lock.fence())
    try:
        for step in (1, 2):
            group.save(step)
            assert group.finish().error is None
        group.save(3)
        take_over(tmp_path / ".lock")
        group.members[0].expire([group.paths.checkpoint_dir(1)])
        result = group.finish()
        assert result.error is not None and "no longer this run's lock" in result.error
        group.members[0].settle()
    finally:
        group.close()
    assert [s for s, folder in group.paths.checkpoint_dirs() if manifest.verify(folder) == []] == [1, 2]
    assert (tmp_path / ".tmp-checkpoint-3").is_dir(), "it may be the other run's"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("strategy", "num_processes"), [("zero2", 2)])
def test_run_ends_with_a_clear_error_and_commits_nothing_when_its_lock_is_taken_over(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    """It saves after each step, so before its heartbeat looks the next time it would have committed dozens."""
    run = tmp_path / "run"
    more = ("train.max_steps=2000", "checkpoint.save_steps=1", "checkpoint.save_total_limit=3")
    pids = lab.start(run, strategy, num_processes, *more, env=_SLOW)
    try:
        wait_until(lambda: (run / "checkpoint-5").exists(), "checkpoint-5")
        other = take_over(run / ".lock")
        time.sleep(0.05)  # for a rename that was under way
        left, told = {p.name for p in run.glob("checkpoint-*")}, files.read_json(run / "run.json")
        codes = lab.zygote.wait()
    finally:
        kill(pids)
    assert 1 in codes and set(codes) <= {1, -9}, log_text(run)
    assert {p.name for p in run.glob("checkpoint-*")} == left
    assert (run / ".lock").read_text() == other
    assert files.read_json(run / "run.json") == told, "it is the other run's now"
    reason = json.loads((run / "logs/error-rank-0.json").read_text())
    assert reason["kind"] == "RunLockLostError" and "was taken over by a run on host" in reason["message"]
