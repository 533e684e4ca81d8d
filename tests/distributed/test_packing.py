"""A run with packing starts where rows stay apart, and is refused at its start elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, log_text, losses


@pytest.mark.parametrize(("strategy", "count"), [("zero3", 2), pytest.param("ddp", 2, marks=pytest.mark.slow)])
def test_packing_is_refused_before_the_first_step_when_the_model_leaks(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    more = (
        "model=scratch", "model.config.model_type=lfm2", "model.config.num_hidden_layers=2",
        "model.config.hidden_size=32", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=2",
        "model.config.full_attn_idxs=[1]", "model.config.block_ff_dim=48", "~model.config.attention_dropout",
    )  # fmt: skip
    codes = lab.run_codes(tmp_path / "run", strategy, count, *more, "data.packing=true")
    assert 2 in codes and set(codes) <= {2, -9}, log_text(tmp_path / "run")
    assert "data.packing=true: lfm2 does not keep the rows of a pack apart" in log_text(tmp_path / "run")
    assert not losses(RunPaths(tmp_path / "run"))
    lab.run(tmp_path / "packed", strategy, count, "data.packing=true", "train.max_steps=2")
