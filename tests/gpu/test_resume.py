"""Promise 1 on CUDA: killed and resumed, a run with `train.full_determinism` ends with the same bits. And promise 8."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from launcher.base.paths import RunPaths
from tests.distributed.runs import different, losses
from tests.gpu.start import Runs

_STEPS, _SAVE = 40, 10
_COMMON = (
    f"train.max_steps={_STEPS}", f"checkpoint.save_steps={_SAVE}", "train.per_device_train_batch_size=4",
    "train.full_determinism=true", "model.config.hidden_size=128", "model.config.intermediate_size=256",
)  # fmt: skip
_CASES = {
    "single-bf16": ("strategy=single", "model.dtype=bfloat16"),
    "single-fp32": ("strategy=single", "model.dtype=float32"),
    "single-fp16": ("strategy=single", "model.dtype=float16", "optim.learning_rate=1e-3"),
    "ddp-bf16": ("strategy=ddp", "model.dtype=bfloat16"),
    "zero1-bf16": ("strategy=zero1", "model.dtype=bfloat16"),
    "zero2-bf16": ("strategy=zero2", "model.dtype=bfloat16"),
    "zero2-fp32": ("strategy=zero2", "model.dtype=float32"),
    "zero2-fp16": ("strategy=zero2", "model.dtype=float16", "optim.learning_rate=1e-3"),
    "zero3-bf16": ("strategy=zero3", "model.dtype=bfloat16"),
    "zero3_offload-bf16": ("strategy=zero3_offload", "model.dtype=bfloat16"),
    "single-lora": ("strategy=single", "model.dtype=bfloat16", "model/peft=lora"),
    "zero2-lora": ("strategy=zero2", "model.dtype=bfloat16", "model/peft=lora"),
    "single-packed": ("strategy=single", "model.dtype=bfloat16", "data.packing=true",
                      "model.config.attention_dropout=0.0"),
    "single-recompute": ("strategy=single", "model.dtype=bfloat16", "model.gradient_checkpointing=true"),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_weights_are_the_same_bits_when_the_run_was_killed(runs: Runs, case: str) -> None:
    more = (*_COMMON, *_CASES[case])
    killed = runs.run_killed("killed", f"checkpoint-{_SAVE}", *more)
    undisturbed = runs.run("undisturbed", *more)
    resumed = runs.run("killed", *more)
    assert "continuing from" in (killed.root / "test.log").read_text()
    name = f"checkpoint-{_STEPS}"
    assert different(undisturbed.root / name, resumed.root / name) == []
    assert losses(undisturbed)[_STEPS] == losses(resumed)[_STEPS]
    assert losses(resumed)[_STEPS] < losses(resumed)[1]
    _loads(resumed, case)


def _loads(run: RunPaths, case: str) -> None:
    """The published model, by transformers alone, on the device."""
    if "lora" in case:
        assert (run.root / "adapter_model.safetensors").is_file()
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.root, dtype="auto").to("cuda")
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert model.dtype == wanted.get(case.rpartition("-")[2], torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8, device="cuda")[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_losses_are_those_of_the_cpu_when_fp32(runs: Runs) -> None:
    """One model, the same first weights and the same batches, on both devices."""
    more = ("train.max_steps=8", "model.config.attention_dropout=0.0", "model.dtype=float32", "strategy=single")
    on_gpu = losses(runs.run("gpu", *more))
    on_cpu = losses(runs.launched("cpu", *more, env={"CUDA_VISIBLE_DEVICES": ""}))
    assert on_gpu.keys() == on_cpu.keys()
    assert all(abs(on_gpu[step] / on_cpu[step] - 1) < 2e-4 for step in on_cpu), (on_gpu, on_cpu)


def test_a_run_stops_and_goes_on_when_started_by_the_launcher(runs: Runs, tmp_path: Path) -> None:
    """As users start it: agent, accelerate launch, rank; a STOP file; the same command again; and once more."""
    more = ("train.max_steps=200", "checkpoint.save_steps=20", "strategy=auto", "launch.num_processes=1")
    process, paths = runs.launch("run", *more), RunPaths(tmp_path / "run")
    deadline = time.monotonic() + 100
    while not (paths.root / "checkpoint-20").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (paths.root / "STOP").touch()
    assert process.wait(60) == 75, (paths.root / "test.log").read_text()[-3000:]
    runs.launched("run", *more)
    state = json.loads(paths.run_state.read_text())
    assert (state["state"], state["step"]) == ("finished", 200)
    runs.launched("run", *more)


def test_more_processes_than_devices_are_refused(runs: Runs) -> None:
    """NCCL takes one process per device."""
    paths = runs.launched("run", "strategy=ddp", "launch.num_processes=2", code=2)
    text = (paths.root / "test.log").read_text()
    assert "launch.num_processes=1" in text and "Traceback" not in text, text[-3000:]
