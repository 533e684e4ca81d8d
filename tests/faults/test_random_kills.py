"""Promise 1, as bluntly as it can be put: SIGKILL at any moment, again and again.

The default tests kill at chosen moments: test_kill_points.py, test_launches.py, tests/distributed/test_exact_resume.py.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, kill, lines, log_text, losses, wait_until

_STEPS = 300
_LONG = (f"train.max_steps={_STEPS}", "checkpoint.save_steps=3", "checkpoint.save_total_limit=2")
_SLOW = {"FAULTS": '[{"kind": "sleep", "seconds": 0.02}]'}


def _kills(lab: Lab, folder: Path, count: int, strategy: str, source: random.Random) -> int:
    """Starts and kills until `count` kills hit a run in training or at its start; returns how many did."""
    run, hits, reached = RunPaths(folder), 0, 0
    while hits < count:
        pids = lab.start(folder, strategy, 2, *_LONG, env=_SLOW)
        if source.random() < 0.2:  # sometimes in the start: imports, recovery, loading
            time.sleep(source.uniform(0.0, 2.0))
        else:
            seen = reached
            wait_until(lambda: max(lines(run), default=0) > seen or _has_ended(pids), "a step", 120)  # noqa: B023
            time.sleep(source.uniform(0.0, 0.6))
        kill(pids if source.random() < 0.5 else [source.choice(pids)])  # all, or one: its peers are ended by the agent
        codes = lab.zygote.wait()
        if codes == [0, 0]:
            return hits
        assert -9 in codes, log_text(folder)
        hits += 1
        for _, checkpoint in run.checkpoint_dirs():
            assert manifest.verify(checkpoint) == [], f"{checkpoint.name} after kill {hits}"
        newest = max((s for s, _ in run.checkpoint_dirs()), default=0)
        assert newest >= reached, "a committed checkpoint was lost"
        reached = newest
    return hits


def _has_ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/fd").exists() for pid in pids)


def _check(lab: Lab, folder: Path, count: int, strategy: str) -> None:
    undisturbed = lab.run(folder / "a", strategy, 2, *_LONG)
    hits = _kills(lab, folder / "b", count, strategy, random.Random(11))
    assert hits == count, f"the run ended after {hits} kills: it is too short for this test"
    run = lab.run(folder / "b", strategy, 2, *_LONG)
    assert different(undisturbed.checkpoint_dir(_STEPS), run.checkpoint_dir(_STEPS)) == []
    assert losses(run) == losses(undisturbed)
    assert not [p.name for p in run.root.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_weights_are_bit_identical_after_25_kills_at_random_moments(lab: Lab, tmp_path: Path, strategy: str) -> None:
    _check(lab, tmp_path, 25, strategy)
