"""Promise 1: a killed run that goes on ends with the bits of one that was never killed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.cli import verify
from launcher.data.tokenizer import byte_tokenizer
from tests.distributed.runs import Lab, different, kill, log_text, losses, tensors, wait_until

_SLOW_STEPS = '[{"kind": "sleep", "seconds": 0.05}, {"kind": "hang", "step": 18}]'
"""The kill may come late on a busy machine, and finds the run still there."""


_SIZES = [("single", 1), *itertools.product(("ddp", "zero1", "zero2", "zero3"), (1, 2, 3, 4))]
_DEFAULT = {("single", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("zero2", 2), ("zero3", 3)}


def _case(size: tuple[str, int]) -> Any:
    return pytest.param(*size, marks=() if size in _DEFAULT else pytest.mark.slow)


def check_exact(lab: Lab, folder: Path, strategy: str, num_processes: int, *more: str) -> RunPaths:
    """Kills a run after its save at step 10, continues it, and compares it with one that was never killed."""
    undisturbed = lab.run(folder / "a", strategy, num_processes, *more)
    killed = folder / "b"
    pids = lab.start(killed, strategy, num_processes, *more, env={"FAULTS": _SLOW_STEPS})
    wait_until(lambda: (killed / "checkpoint-10").exists(), "checkpoint-10")
    kill(pids)
    codes = lab.zygote.wait()
    assert all(codes), "the run had ended before it was killed"
    assert not (killed / "checkpoint-20").exists()

    continued = lab.run(killed, strategy, num_processes, *more)

    assert different(undisturbed.checkpoint_dir(10), continued.checkpoint_dir(10)) == []
    assert different(undisturbed.checkpoint_dir(20), continued.checkpoint_dir(20)) == []
    assert losses(continued) == losses(undisturbed)
    assert len(losses(continued)) == 20
    first, last = tensors(continued.checkpoint_dir(10)), tensors(continued.checkpoint_dir(20))
    assert any(not first[k].equal(last[k]) for k in first), "nothing was trained after the resume"
    return continued


@pytest.mark.parametrize(("strategy", "num_processes"), [_case(size) for size in _SIZES])
def test_weights_and_losses_equal_when_killed_after_a_save(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    """Steps 11 to 20 lie inside epochs and across their ends (steps 14 and 19); dropout and accumulation are on."""
    check_exact(lab, tmp_path, strategy, num_processes)


_LAYERDROP = (
    "model.config={model_type: opt, hidden_size: 32, ffn_dim: 48, num_hidden_layers: 3, num_attention_heads: 4, "
    "word_embed_proj_dim: 32, max_position_embeddings: 64, layerdrop: 0.5}",
)  # fmt: skip
"""Each process leaves other layers out in each forward pass: their parameters get no gradient there."""
_MOE = (
    "model.config={model_type: qwen3_moe, hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, "
    "head_dim: 8, num_attention_heads: 4, num_key_value_heads: 2, num_experts: 8, num_experts_per_tok: 1, "
    "norm_topk_prob: true}",
)  # fmt: skip
_SINKS = (
    "model.config={model_type: gpt_oss, hidden_size: 32, intermediate_size: 16, num_hidden_layers: 2, head_dim: 8, "
    "num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2}",
)
"""Parameters beside modules with parameters: their order at the first start and after a resume can differ."""
_FLAT = "model.config.attention_dropout=0.0"
"""With dropout there is no attention of ours, and no batches without padding."""
_WIDE = (
    "model.config={model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512}", _FLAT, "data.packing=true",
    "data.max_length=512",
)  # fmt: skip
"""Products large enough for the CPU's own (launcher/model/cpu_products.py)."""
_CPU_ADAM = "strategy.deepspeed.zero_force_ds_cpu_optimizer=true"
"""DeepSpeed's own Adam of the host, which offload uses where there is a GPU."""
_OFFLOADED = (_CPU_ADAM, "strategy.deepspeed.zero_optimization={offload_optimizer: {device: cpu}}")
_LORA = ("model/peft=lora", "model.peft.r=4", "model.peft.target_modules=all-linear")


@pytest.mark.parametrize(
    ("strategy", "num_processes", "more"),
    [
        pytest.param("ddp", 3, _LAYERDROP, id="ddp-3-layerdrop", marks=pytest.mark.slow),
        pytest.param("ddp", 3, ("model.dtype=bfloat16", "model.gradient_checkpointing=true", _FLAT), id="ddp-3-bf16"),
        pytest.param("zero2", 2, (_FLAT,), id="zero2-2-flat", marks=pytest.mark.slow),
        pytest.param("zero3", 3, (_FLAT, "data.packing=true", "data.max_length=128"), id="zero3-3-packed",
                     marks=pytest.mark.slow),
        pytest.param("ddp", 2, _WIDE, id="ddp-2-wide"),
        pytest.param("zero2", 3, _WIDE, id="zero2-3-wide", marks=pytest.mark.slow),
        pytest.param("zero3", 3, (*_WIDE, "model.gradient_checkpointing=true"), id="zero3-3-wide"),
        pytest.param("ddp", 4, ("train.per_device_train_batch_size=1", *_MOE), id="ddp-4-moe", marks=pytest.mark.slow),
        pytest.param("ddp", 3, (*_LORA, "model.dtype=bfloat16"), id="ddp-3-lora", marks=pytest.mark.slow),
        pytest.param("zero2", 3, ("model.dtype=bfloat16", *_MOE), id="zero2-3-moe", marks=pytest.mark.slow),
        pytest.param("zero3", 3, ("model.dtype=bfloat16", *_MOE), id="zero3-3-moe", marks=pytest.mark.slow),
        pytest.param("zero3", 3, _SINKS, id="zero3-3-gpt-oss", marks=pytest.mark.slow),
        pytest.param("zero3", 3, (*_LORA, "model.gradient_checkpointing=true"), id="zero3-3-lora",
                     marks=pytest.mark.slow),
        pytest.param("zero3_offload", 2, (_CPU_ADAM,), id="zero3_offload-2", marks=pytest.mark.slow),
        pytest.param("zero3_offload", 3, (_CPU_ADAM, "model.dtype=bfloat16"), id="zero3_offload-3-bf16",
                     marks=pytest.mark.slow),
        pytest.param("zero2", 2, ("model.dtype=bfloat16", *_OFFLOADED), id="zero2-2-offloaded", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_weights_and_losses_equal_when_killed_with_other_models(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int, more: tuple[str, ...]
) -> None:
    check_exact(lab, tmp_path, strategy, num_processes, *more)


@pytest.mark.slow
def test_weights_equal_when_resumed_late_with_the_adam_of_the_host(lab: Lab, tmp_path: Path) -> None:
    """From step 19 on a power of a beta in fp32 is not the product of so many: whoever multiplied must not go on so."""
    more = (_CPU_ADAM, "train.max_steps=30", "checkpoint.save_steps=20")
    undisturbed = lab.run(tmp_path / "a", "zero3_offload", 1, *more)
    resumed = f"checkpoint.resume_from_checkpoint={undisturbed.checkpoint_dir(20)}"
    continued = lab.run(tmp_path / "b", "zero3_offload", 1, *more, resumed)
    assert min(losses(continued)) == 21
    assert different(undisturbed.checkpoint_dir(30), continued.checkpoint_dir(30)) == []


def _save_at_odd_places(folder: Path) -> None:
    """A small Llama whose weights begin 8 bytes off in its file, as SmolLM2's do."""
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        eos_token_id=257, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    header += b" " * (-len(header) % 16)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [
        ("single", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 2), ("zero2", 2), ("zero3", 3))),
    ],
)
def test_weights_equal_when_killed_wherever_the_models_file_has_them(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    """One label in each micro-batch: torch multiplies the head with a single row, in an order that depends on where the
    head begins in memory."""
    torch.manual_seed(0)
    _save_at_odd_places(tmp_path / "base")
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps({"text": chr(ord("a") + i % 26)}) + "\n" for i in range(52)))
    check_exact(
        lab, tmp_path, strategy, num_processes, "model=pretrained", f"model.model_name_or_path={tmp_path / 'base'}",
        f"data.train_files=[{data}]", "train.per_device_train_batch_size=1", "data.packing=false",
    )  # fmt: skip


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
