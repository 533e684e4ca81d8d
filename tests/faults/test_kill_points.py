"""Promises 1, 3, 4 and 5 at every operation of a save, a commit, a retention, a publication, a push and a resume.

The process is killed there, or the disk refuses. With 1, 2, 3 and 4 processes; see `sweep.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.syscalls import preloaded

ROOT = Path(__file__).resolve().parents[2]
_SAVES = [
    f"save-{layout}-{n}-rank-{rank}" for n in (1, 2, 3, 4) for layout in ("small", "direct", "sharded")
    for rank in range(n)
]  # fmt: skip
_AGAIN = [f"save-sharded-{n}-rank-{rank}-again" for n in (1, 2, 3, 4) for rank in range(n)]
_AHEAD = [f"save-ahead-{n}-rank-{rank}" for n in (1, 2, 3) for rank in range(n)]
_OTHERS = [
    *(f"publish-{kind}-{n}" for kind in ("copy", "temporary") for n in (1, 2)),
    *(f"push-{strategy}" for strategy in ("all_checkpoints", "every_save", "checkpoint")),
    *(f"resume-{n}" for n in (1, 2, 3, 4)),
]
ALL = [*_SAVES, *_AGAIN, *_AHEAD, *_OTHERS]
FEW = [
    "save-small-2-rank-0",
    "save-small-2-rank-1",
    "save-ahead-2-rank-0",
    "publish-copy-1",
    "push-all_checkpoints",
    "resume-1",
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: thousands of fsyncs on a disk take minutes, and a kill does not need them."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="launcher-kills-", dir=base) as name:
        yield Path(name)


def sweep(folder: Path, modes: list[str], share: int, names: list[str]) -> list[dict[str, Any]]:
    """All points of these scenarios, on two cores; fails with what was inconsistent."""

    def part(number: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.faults.sweep", str(folder / str(number)), ",".join(modes), str(share)]
        done = subprocess.run(
            [*command, *names[number::2]], cwd=ROOT, text=True, capture_output=True, timeout=1200,
            env={**os.environ, **preloaded(), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        results = [result for found in pool.map(part, (0, 1)) for result in found]
    bad = [
        f"{r['scenario']}, {r['mode']} at operation {r['at']} ({r['what']}): {p}"
        for r in results
        for p in r["problems"]
    ]
    assert not bad, f"{len(bad)} of {len(results)}:\n" + "\n".join(bad[:20])
    assert {r["scenario"] for r in results} == set(names), "a scenario had no point"
    return results


def test_nothing_is_lost_when_an_operation_is_the_last_one_or_fails(folder: Path) -> None:
    """Kills; a disk that is full, over quota or broken for a moment, or read-only from one on: a sample of each."""
    modes = ["before", "half", "once:ENOSPC", "once:EDQUOT", "once:EIO", "from_here:EROFS"]
    results = sweep(folder, modes, 19, FEW)
    assert {r["mode"].partition(" ")[0] for r in results} == {"before", "half", "once", "from_here"}
    assert len(results) >= 80


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_is_lost_by_3072_kills_at_all_operations(folder: Path) -> None:
    """Each kill leaves another disk: before every change, and in the middle of every write."""
    kills = sweep(folder, ["before", "half"], 1, ALL)
    print({kind: sum(k["scenario"].startswith(kind) for k in kills) for kind in ("save", "publish", "push", "resume")})
    assert len(kills) >= 3072


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_run_goes_on_or_ends_with_a_named_error_at_all_operations(folder: Path, error: str) -> None:
    """Once (the disk recovers), and from there on until the process has ended."""
    names = [n for n in ALL if "-small-" in n or n in (*_AHEAD, *_OTHERS)]
    assert len(sweep(folder, [f"once:{error}", f"from_here:{error}"], 3, names)) >= 500
