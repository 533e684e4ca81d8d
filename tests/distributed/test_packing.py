"""A run with packing starts where rows stay apart, and is refused at its start elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.paths import RunPaths
from launcher.data.tokenizer import byte_tokenizer
from tests.architectures import model_config
from tests.distributed.runs import Lab, lines, log_text, losses, state


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


@pytest.mark.parametrize("packing", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_losses_are_those_of_padded_rows_when_rows_stand_one_after_another(
    lab: Lab, tmp_path: Path, packing: str
) -> None:
    """Training and evaluation, with our attention and flat batches against sdpa on one process."""
    more = (
        "model.config.attention_dropout=0.0", "train.max_steps=4", "data.eval_split=0.3", "eval.eval_strategy=steps",
        "eval.eval_steps=2", "checkpoint.save_steps=4", f"data.packing={packing}",
    )  # fmt: skip
    plain = ("model.attn_implementation=sdpa", "data.padding_free=false")
    expected = lab.run(tmp_path / "sdpa", "single", 1, *more, *plain)
    found = lab.run(tmp_path / "ours", "zero2", 2, *more)
    assert state(expected.checkpoint_dir(4))["settings"]["attention"] == {"name": "sdpa", "is_flat": False}
    assert state(found.checkpoint_dir(4))["settings"]["attention"] == {"name": "cpu_blocks", "is_flat": True}
    for key in ("loss", "eval_loss"):
        a, b = lines(expected, key), lines(found, key)
        assert a.keys() == b.keys() != set()
        assert max(abs(a[step][key] / b[step][key] - 1) for step in a) <= 1e-5


_SLOW = pytest.mark.slow
_ROWS, _PACKS = 37, 6


@pytest.mark.parametrize(
    ("name", "strategy", "count"),
    [
        ("gpt_oss", "zero3", 2),
        pytest.param("falcon", "ddp", 3, marks=_SLOW),
        pytest.param("opt", "zero3", 3, marks=_SLOW),
        pytest.param("gemma3_text", "ddp", 3, marks=_SLOW),
        pytest.param("qwen3_moe", "zero3", 2, marks=_SLOW),
        pytest.param("phi3", "zero3", 3, marks=_SLOW),
        pytest.param("olmoe", "ddp", 2, marks=_SLOW),
    ],
)
def test_training_on_packs_is_training_on_their_rows_when_recomputing(
    lab: Lab, tmp_path: Path, name: str, strategy: str, count: int
) -> None:
    """Every step takes all rows, so packs or not it is the same step: losses and gradients, trained on."""
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0} if name == "opt" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(name), **no_dropout))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    more = (
        "model=pretrained", f"model.model_name_or_path={tmp_path / 'base'}", "model.gradient_checkpointing=true",
        "data.max_length=256", "train.max_steps=4", "checkpoint=off", "optim.name=torch.optim.AdamW",
    )  # fmt: skip
    apart = lab.run(tmp_path / "rows", "single", 1, *more, f"train.train_batch_size={_ROWS}")
    packs = ("data.packing=true", f"train.train_batch_size={_PACKS}")
    packed = lab.run(tmp_path / "packs", strategy, count, *more, *packs)
    assert f"packing: {_ROWS} rows in {_PACKS} samples" in log_text(packed.root)
    for key in ("loss", "grad_norm"):
        a, b = lines(apart, key), lines(packed, key)
        assert len(a) == len(b) == 4
        assert max(abs(a[step][key] / b[step][key] - 1) for step in a) <= 1e-5
