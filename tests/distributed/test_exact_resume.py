"""Promise 1: a killed run that goes on ends with the bits of one that was never killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base import files
from launcher.cli import verify
from tests.distributed.runs import Lab, different, kill, log_text, losses, tensors, wait_until

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


def test_run_finishes_when_another_tools_folder_has_the_name_of_its_checkpoints(lab: Lab, tmp_path: Path) -> None:
    """It is never moved: a save in the middle is made up for a step later, of the last step the model is kept."""
    undisturbed = lab.run(tmp_path / "a", "zero2", 2)
    folder = tmp_path / "b"
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "pytorch_model.bin").write_bytes(b"from elsewhere")
    run = lab.run(folder, "zero2", 2)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed.root / "model.safetensors").read_bytes()
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11", "checkpoint-20"]
    for step in (10, 20):
        assert [p.name for p in run.checkpoint_dir(step).iterdir()] == ["pytorch_model.bin"]
    assert verify.main([str(run.checkpoint_dir(11))]) == 0
    text = log_text(folder)
    assert "checkpoint-10 is there already and is not of this run" in text
    assert "checkpoint-20 is not of this run and stays: of step 20 only the model is kept" in text
    assert files.read_json(run.run_state)["state"] == "finished"
    assert not list(folder.glob(".tmp-*"))
