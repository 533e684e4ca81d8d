"""Promise 1: a killed run that goes on ends with the bits of one that was never killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import Lab, different, kill, losses, tensors, wait_until

_SLOW_STEPS = '[{"kind": "sleep", "seconds": 0.05}]'


@pytest.mark.parametrize(
    ("strategy", "num_processes"), [("single", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_weights_and_losses_equal_when_killed_after_a_save(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    """Steps 11 to 20 lie inside epochs and across their ends (steps 14 and 19); dropout and accumulation are on."""
    undisturbed = lab.run(tmp_path / "a", strategy, num_processes)
    killed = tmp_path / "b"
    pids = lab.start(killed, strategy, num_processes, env={"FAULTS": _SLOW_STEPS})
    wait_until(lambda: (killed / "checkpoint-10").exists(), "checkpoint-10")
    kill(pids)
    codes = lab.zygote.wait()
    assert all(codes), "the run had ended before it was killed"
    assert not (killed / "checkpoint-20").exists()

    continued = lab.run(killed, strategy, num_processes)

    assert different(undisturbed.checkpoint_dir(10), continued.checkpoint_dir(10)) == []
    assert different(undisturbed.checkpoint_dir(20), continued.checkpoint_dir(20)) == []
    assert losses(continued) == losses(undisturbed)
    assert len(losses(continued)) == 20
    first, last = tensors(continued.checkpoint_dir(10)), tensors(continued.checkpoint_dir(20))
    assert any(not first[k].equal(last[k]) for k in first), "nothing was trained after the resume"
