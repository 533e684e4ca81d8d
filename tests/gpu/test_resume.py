"""Promise 1 on CUDA: killed and resumed, a run with `train.full_determinism` ends with the same bits. And promise 8."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launcher.base.paths import RunPaths
from tests.distributed.runs import different, lines, losses
from tests.gpu.group_of_one import TOLD
from tests.gpu.start import Runs
from tests.unit.test_build_model import make_base

_STEPS, _SAVE = 40, 20
_COMMON = (
    f"train.max_steps={_STEPS}", f"checkpoint.save_steps={_SAVE}", "train.per_device_train_batch_size=4",
    "train.full_determinism=true",
)  # fmt: skip
_MODEL = (
    "model.config.hidden_size=128", "model.config.intermediate_size=256", "model.config.attention_dropout=0.0",
)  # fmt: skip
_LORA = ("model=pretrained", "model/peft=lora", "model.dtype=bfloat16")
_CASES = {
    "single-bf16": ("strategy=single", "model.dtype=bfloat16"),
    "single-fp32": ("strategy=single", "model.dtype=float32"),
    "single-fp16": ("strategy=single", "model.dtype=float16", "optim.learning_rate=1e-3"),
    "ddp-bf16": ("strategy=ddp", "model.dtype=bfloat16", "optim.name=tests.gpu.group_of_one.AdamW"),
    "zero1-bf16": ("strategy=zero1", "model.dtype=bfloat16"),
    "zero2-bf16": ("strategy=zero2", "model.dtype=bfloat16"),
    "zero2-fp32": ("strategy=zero2", "model.dtype=float32"),
    "zero2-fp16": ("strategy=zero2", "model.dtype=float16", "optim.learning_rate=1e-3"),
    "zero3-bf16": ("strategy=zero3", "model.dtype=bfloat16"),
    "zero3_offload-bf16": ("strategy=zero3_offload", "model.dtype=bfloat16"),
    "single-lora": ("strategy=single", *_LORA),
    "zero2-lora": ("strategy=zero2", *_LORA),
    "single-packed": ("strategy=single", "model.dtype=bfloat16", "data.packing=true"),
    "single-dropout": ("strategy=single", "model.dtype=bfloat16", "model.config.attention_dropout=0.1"),
    "single-recompute": ("strategy=single", "model.dtype=bfloat16", "model.gradient_checkpointing=true"),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_weights_are_the_same_bits_when_the_run_was_killed(runs: Runs, tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base", "llama")
    of_model = (f"model.model_name_or_path={base}",) if "lora" in case else _MODEL
    more = (*_COMMON, *of_model, *_CASES[case])
    killed = runs.run_killed("killed", f"checkpoint-{_SAVE}", *more)
    undisturbed = runs.run("undisturbed", *more)
    resumed = runs.run("killed", *more)
    text = (killed.root / "test.log").read_text()
    assert "continuing from" in text and ("ddp" not in case or text.count(TOLD) == 2), text[-3000:]
    name = f"checkpoint-{_STEPS}"
    assert different(undisturbed.root / name, resumed.root / name) == []
    assert losses(undisturbed)[_STEPS] == losses(resumed)[_STEPS]
    assert losses(resumed)[_STEPS] < losses(resumed)[1]
    _loads(resumed, case, base)


def _loads(run: RunPaths, case: str, base: Path) -> None:
    """The published model, by transformers alone, or an adapter by peft, on the device."""
    ids = torch.arange(8, device="cuda")[None]
    model: Any
    if "lora" in case:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(plain, run.root).to("cuda")
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=ids).logits
    else:
        model, before = AutoModelForCausalLM.from_pretrained(run.root, dtype="auto").to("cuda"), None
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        assert model.dtype == wanted.get(case.rpartition("-")[2], torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all()) and (before is None or not logits.equal(before))


def test_losses_are_those_of_the_cpu_when_fp32(runs: Runs) -> None:
    """One model, the same first weights and the same batches, on both devices."""
    more = ("train.max_steps=8", "model.config.attention_dropout=0.0", "model.dtype=float32", "strategy=single")
    on_gpu = losses(runs.run("gpu", *more))
    on_cpu = losses(runs.launched("cpu", *more, env={"CUDA_VISIBLE_DEVICES": ""}))
    assert on_gpu.keys() == on_cpu.keys()
    assert all(abs(on_gpu[step] / on_cpu[step] - 1) < 2e-4 for step in on_cpu), (on_gpu, on_cpu)


def test_a_run_stops_and_goes_on_when_started_by_the_launcher(runs: Runs, tmp_path: Path) -> None:
    """As users start it: agent, accelerate launch, rank; a STOP file; the same command again; and once more."""
    more = (
        "train.max_steps=200", "checkpoint.save_steps=20", "strategy=auto", "launch.num_processes=1",
        "train.per_device_train_batch_size=auto", "data.eval_split=0.2", "eval.eval_strategy=steps",
        "eval.eval_steps=100",
    )  # fmt: skip
    process, paths = runs.launch("run", *more), RunPaths(tmp_path / "run")
    deadline = time.monotonic() + 100
    while not (paths.root / "checkpoint-20").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (paths.root / "STOP").touch()
    code, text = process.wait(60), (paths.root / "test.log").read_text()
    assert code == 75 and "strategy=single, 8 samples per forward and backward: needs" in text, text[-3000:]
    runs.launched("run", *more)
    state = json.loads(paths.run_state.read_text())
    assert (state["state"], state["step"]) == ("finished", 200)
    assert all(math.isfinite(lines(paths, "eval_loss")[step]["eval_loss"]) for step in (100, 200))
    runs.launched("run", *more)


def test_more_processes_than_devices_are_refused(runs: Runs) -> None:
    """NCCL takes one process per device."""
    paths = runs.launched("run", "strategy=ddp", "launch.num_processes=2", code=2)
    text = (paths.root / "test.log").read_text()
    assert "launch.num_processes=1" in text and "Traceback" not in text, text[-3000:]
