"""A mixture's router loss is trained on where its config asks for it, however the step is split: promise 7."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.compose import compose
from launcher.data import StepSampler, build_data, build_tokenizer, collate
from launcher.data.tokenizer import byte_tokenizer
from tests.architectures import model_config
from tests.distributed.runs import Lab, lines, losses

COEFFICIENT = 0.5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    settings = {**model_config("mixtral"), "output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def overrides(base: Path, *more: str) -> list[str]:
    return [
        "model=pretrained", f"model.model_name_or_path={base}", "train.max_steps=3", "train.train_batch_size=4",
        "train.max_grad_norm=0", "optim=sgd", "optim.name=torch.optim.SGD", "optim.kwargs.momentum=0",
        "optim.learning_rate=0.1", "optim.weight_decay=0", "scheduler=constant", "scheduler.warmup_steps=0",
        "model.attn_implementation=eager", *more,
    ]  # fmt: skip


def test_one_step_is_that_of_transformers_own_loss(lab: Lab, base: Path, tmp_path: Path) -> None:
    more = overrides(base, "train.per_device_train_batch_size=4", "train.max_steps=1")
    run = lab.run(tmp_path / "run", "single", 1, *more)
    config = compose(lab.overrides(tmp_path / "run", "single", *more))
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
    rows = StepSampler(len(data.train), 4, config.seed).rows_of_step(0)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    out = model(**collate(data.train, rows, tokenizer.pad_token_id))
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    line = lines(run)[1]
    assert line["router_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert line["loss"] + COEFFICIENT * line["router_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(run.checkpoint_dir(1), dtype=torch.float32)
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize(("strategy", "count", "micro"), [("single", 1, 2), ("ddp", 2, 2), ("zero2", 2, 1)])
def test_router_loss_does_not_grow_with_processes_or_micro_batches(
    lab: Lab, base: Path, tmp_path: Path, strategy: str, count: int, micro: int
) -> None:
    whole = lab.run(tmp_path / "whole", "single", 1, *overrides(base, "train.per_device_train_batch_size=4"))
    split = lab.run(tmp_path / "split", strategy, count, *overrides(base, f"train.per_device_train_batch_size={micro}"))
    for step, line in lines(whole).items():
        assert lines(split)[step]["router_loss"] == pytest.approx(line["router_loss"], rel=0.1)
        assert losses(split)[step] == pytest.approx(losses(whole)[step], rel=1e-3)
