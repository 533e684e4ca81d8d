"""`accelerator.save_state(folder)` and `load_state(folder)` mean the folder that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base import manifest
from tests.distributed.runs import Lab, different

SAVES_ELSEWHERE = "tests.distributed.elsewhere.ElsewhereAdamW"


@pytest.mark.parametrize(("strategy", "num_processes"), [("ddp", 2), ("zero3", 3)])
def test_state_is_saved_into_and_loaded_from_the_named_folder_when_somebody_else_asks(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    """Beside the loop's own saves: at the end of step 5 into another folder, loaded again at once."""
    target = tmp_path / "by hand" / "mine"
    target.parent.mkdir()
    env = {"SAVE_TO": str(target)}
    run = lab.run(
        tmp_path / "run", strategy, num_processes, f"optim.name={SAVES_ELSEWHERE}", "train.max_steps=10", env=env
    )
    assert manifest.verify(target) == [] and manifest.read(target).step == 4
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    plain = lab.run(tmp_path / "plain", strategy, num_processes, "train.max_steps=10")
    assert different(plain.checkpoint_dir(10), run.checkpoint_dir(10)) == [], "the detour changed the run"
