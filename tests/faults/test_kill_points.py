"""Promises 1, 3 and 4 at every single operation of a save, a retention and a recovery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: thousands of fsyncs on a disk take minutes, and a kill does not need them."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="launcher-kills-", dir=base) as name:
        yield Path(name)


def sweep(folder: Path, role: str, mode: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.file_layer", str(folder), role, mode], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert not results[-1]["springs"], "the last one is undisturbed"
    bad = [f"at operation {r['at']}: {p}" for r in results for p in r["problems"]]
    assert not bad, "\n".join(bad) + done.stderr[-2000:]
    return results[:-1]


@pytest.mark.parametrize("mode", ["before", "half"])
def test_newest_whole_checkpoint_is_found_when_the_main_writer_is_killed(folder: Path, mode: str) -> None:
    """At least 30 points: every write, fsync, rename and delete of the save, the commit and the retention."""
    results = sweep(folder, "main", mode)
    assert len(results) >= 30
    assert any(r["committed"] for r in results) and any(not r["committed"] for r in results)


@pytest.mark.parametrize("mode", ["before", "half"])
def test_newest_whole_checkpoint_is_found_when_another_ranks_writer_is_killed(folder: Path, mode: str) -> None:
    results = sweep(folder, "other", mode)
    assert len(results) >= 8
    assert not any(r["committed"] for r in results), "committed although a process had not written its part"


def test_recovery_succeeds_when_it_was_killed_itself(folder: Path) -> None:
    """The start that cleans up after a kill is killed at each of its own operations."""
    assert len(sweep(folder, "recovery", "before")) >= 12


@pytest.mark.parametrize("role", ["main", "other"])
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO"])
def test_earlier_checkpoints_are_whole_and_the_next_save_succeeds_when_an_operation_fails(
    folder: Path, role: str, error: str
) -> None:
    """A disk that is full (or over quota, or failing) at every stage of a save."""
    assert len(sweep(folder, role, error)) >= 8
