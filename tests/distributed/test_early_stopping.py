"""Early stopping counts evaluations, also over a resume, and an ended run stays ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base import files
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, lines, log_text, write_rows


@pytest.mark.parametrize(("strategy", "count"), [("zero2", 2), pytest.param("ddp", 3, marks=pytest.mark.slow)])
def test_run_ends_at_the_same_step_when_it_was_stopped_in_between(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    """A learning rate of 0 improves nothing after the first evaluation."""
    write_rows(tmp_path / "eval.jsonl", 8)
    more = (
        f"data.eval_files=[{tmp_path / 'eval.jsonl'}]", "eval.eval_strategy=steps", "eval.eval_steps=2",
        "optim.learning_rate=0", "train.early_stopping_patience=3", "checkpoint.save_steps=2", "train.max_steps=40",
    )  # fmt: skip
    whole = lab.run(tmp_path / "whole", strategy, count, *more)
    assert max(lines(whole)) == 8 and "stopped early" in log_text(whole.root)
    assert files.read_json(whole.run_state)["stopped_early"] is True

    part = RunPaths(tmp_path / "part")
    fault = {"FAULTS": '[{"kind": "kill", "rank": 0, "step": 6}]'}
    assert -9 in lab.run_codes(part.root, strategy, count, *more, env=fault)
    lab.run(part.root, strategy, count, *more)
    assert max(lines(part)) == 8 and different(whole.checkpoint_dir(8), part.checkpoint_dir(8)) == []
    lab.run(part.root, strategy, count, *more)
    assert max(lines(part)) == 8, "an ended run went on"
