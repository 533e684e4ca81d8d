"""The memory model and `launcher plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs import plan_page
from launcher.base.device_memory import host_bytes, parse_bytes
from launcher.base.errors import ConfigError, UserError
from launcher.cli.plan import main
from launcher.config.compose import compose
from launcher.data import build_tokenizer
from launcher.model.memory.devices import Device
from launcher.model.memory.plan import MemoryModel
from launcher.saving.checkpoint_size import disk_bytes

GPU = Device("cuda", 80 * 10**9, "a test's")
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def _memory(*overrides: str, count: int = 1, device: Device = GPU) -> MemoryModel:
    config = compose(["data=arithmetic", *overrides])
    return MemoryModel(config, device, count, build_tokenizer(config) if config.model.config else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


def _plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_a_plan_needs_no_weights_and_no_data_when_there_is_a_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(capsys, f"model.model_name_or_path={folder}", "model.dtype=bfloat16", "--device-memory", "80GB",
                 "launch.num_processes=8", "train.per_device_train_batch_size=1")  # fmt: skip
    assert plan["num_parameters"] == plan["num_trainable_parameters"] == 6_738_415_616
    parts = plan["memory_bytes_per_device"]
    assert set(parts) == {"weights", "gradients", "optimizer", "activations", "other", "total"}
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    ck = plan["checkpoint_bytes"]
    assert ck["model"] == pytest.approx(2 * 6_738_415_616, rel=1e-3)  # the tutorial's 14 GB
    assert ck["state"] == pytest.approx(12 * 6_738_415_616, rel=1e-3)  # its 28 GB leave masters out and round moments
    assert {s["name"]: s["fits"] for s in plan["strategies"]} == {
        "ddp": False, "zero1": True, "zero2": True, "zero3": True, "zero3_offload": True,
    }  # fmt: skip


def test_a_plan_is_plain_lines_when_it_is_piped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"model.model_name_or_path={folder}", "train.max_steps=100", "--tokens-per-s", "1000"]) == 0
    out = capsys.readouterr().out
    assert "6.74B parameters" in out and "\x1b" not in out and "100 steps" in out


def test_nothing_but_the_plan_is_said_when_libraries_have_more_to_say() -> None:
    """bitsandbytes tells of kernels as it is imported, once per process."""
    command = [sys.executable, "-m", "launcher.cli", "plan", "model=tiny_llama", "model/peft=lora", "data=arithmetic"]
    process = subprocess.run([*command, "--device-memory", "80GB"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "parameters" in process.stdout
    assert process.stderr == ""


def test_a_config_error_is_told_before_anything_is_planned() -> None:
    with pytest.raises(ConfigError, match="model_name_or_path"):
        main(["data=arithmetic", "model=pretrained"])
    with pytest.raises(UserError, match="--device-memory"):
        main(["--device-memory", "lots"])


def test_lora_trains_little_when_the_base_is_frozen() -> None:
    whole = _memory("model=tiny_llama").plan("single")
    small = _memory("model=tiny_llama", "model/peft=lora").plan("single")
    assert small.parts.optimizer < whole.parts.optimizer / 2
    assert small.parts.gradients < whole.parts.gradients / 2


def test_recomputing_takes_less_when_layers_are_many() -> None:
    settings = ("model=tiny_llama", "model.config.num_hidden_layers=8")
    kept = _memory(*settings).plan("single").parts.activations
    assert _memory(*settings, "model.gradient_checkpointing=true").plan("single").parts.activations < kept / 2


def test_layers_are_extrapolated_when_there_are_several_kinds() -> None:
    kinds = '["full_attention","sliding_attention","full_attention","sliding_attention","full_attention"]'
    settings = (
        "model.config.model_type=qwen2", "model.config.hidden_size=64", "model.config.intermediate_size=96",
        "model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "model.config.vocab_size=300",
        "model.config.num_hidden_layers=5", "model.config.sliding_window=16",
        "model.config.use_sliding_window=true", f"model.config.layer_types={kinds}", "data.max_length=64",
    )  # fmt: skip
    memory = _memory(*settings, "train.per_device_train_batch_size=2")
    extrapolated = memory.plan("single").parts.activations
    sampled = memory._sampled()
    assert len(sampled.firsts) == 2 and [count for _, count in sampled.repeated] == [2, 1]
    assert extrapolated > 0


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_every_process_holds_less_when_there_are_more(stage: str) -> None:
    few, many = (_memory("model=tiny_llama", count=n).plan(stage).parts.optimizer for n in (2, 4))
    assert many == pytest.approx(few / 2)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_bucket_is_never_larger_than_what_is_written_when_there_is_no_gpu(stage: str) -> None:
    small = "strategy.deepspeed.zero_optimization.reduce_bucket_size=1000"
    on_cpu, on_gpu, with_small = (
        _memory("model=tiny_llama", *more, count=2, device=device).plan(stage).parts.total
        for device, more in ((Device("cpu", 10**10, "a test's"), ()), (GPU, ()), (GPU, (small,)))
    )
    assert with_small <= on_cpu < on_gpu - 10**9


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    memory = _memory("model=tiny_llama", "train.train_batch_size=512", device=Device("cuda", 1_400_000_000, "a test's"))
    plan = memory.plan("single")
    assert 1 <= plan.largest_micro_batch < 512
    limit = memory.device.usable_bytes
    assert memory.parts("single", plan.largest_micro_batch).total <= limit
    assert memory.parts("single", plan.largest_micro_batch + 1).total > limit


def test_sizes_are_read_when_people_write_them() -> None:
    assert parse_bytes("80GB", "x") == 80 * 10**9
    assert parse_bytes("24 GiB", "x") == 24 * 2**30
    assert parse_bytes("200e9", "x") == 200 * 10**9
    assert host_bytes() > 2**30
    with pytest.raises(UserError, match=r"--device-memory 80 means 80 bytes\. With a unit: --device-memory 80GB"):
        parse_bytes("80", "--device-memory")


def test_an_architecture_is_named_when_it_cannot_run_without_values() -> None:
    settings = ("model.config.model_type=mamba", "model.config.hidden_size=64", "model.config.num_hidden_layers=2")
    with pytest.raises(UserError, match="mamba cannot be planned"):
        _memory(*settings).plan("single")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_planned_when_torch_has_their_kernel_in_one_dtype_only(dtype: str) -> None:
    settings = [f"model.config.{key}=64" for key in ("hidden_size", "intermediate_size")]
    heads = ("model.config.num_attention_heads=4", "model.config.num_key_value_heads=2")
    mixtral = ("model.config.model_type=mixtral", "model.config.num_hidden_layers=2", f"model.dtype={dtype}")
    plan = _memory(*mixtral, *settings, *heads).plan("single")
    assert plan.parts.activations > 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model_type=t5", "t5 is no causal language model"),
        ("hidden_size=0", "no llama can be made of this model.config"),
    ],
)
def test_a_config_is_named_when_no_model_can_be_made_of_it(setting: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        _memory("model.config.model_type=llama", f"model.config.{setting}").plan("single")


@pytest.mark.parametrize(
    ("overrides", "steps", "expected"),
    [
        (["checkpoint=recommended"], 10_000, 6 * 100 + 10),  # five, and one that is being written
        (["checkpoint=recommended"], 1000, 2 * 100 + 10),
        (["checkpoint=last"], 10_000, 2 * 100 + 10),
        (["checkpoint=all"], 10_000, 20 * 100 + 10),
        (["checkpoint=all"], None, None),
        (["checkpoint=off"], 10_000, 10),
    ],
)
def test_disk_holds_what_the_retention_lets_stay(overrides: list[str], steps: int | None, expected: int | None) -> None:
    assert disk_bytes(compose(["data=arithmetic", *overrides]), 100, 10, steps) == expected


@pytest.mark.slow
def test_table_of_the_page_is_up_to_date() -> None:
    page = plan_page.TARGET.read_text(encoding="utf-8")
    assert page == plan_page.filled(page), "run: make docs"
