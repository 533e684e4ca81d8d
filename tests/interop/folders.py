"""Checkpoints made by hand, as transformers' Trainer and as ours write them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.checkpoint.writer import Writer
from launcher.config.compose import compose
from launcher.config.settings import RunConfig

STEP = 10


def config_of(output_dir: Path, *more: str) -> RunConfig:
    rows = output_dir.parent / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    return compose(
        [f"data.train_files=[{rows}]", "model=tiny_llama", f"output_dir={output_dir}", "optim.learning_rate=0.01",
         "optim.weight_decay=0.1", *more]
    )  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip


def groups_of(model: nn.Module) -> list[list[str]]:
    names = [name for name, _ in model.named_parameters()]
    return [[n for n in names if "norm" not in n], [n for n in names if "norm" in n]]


def write_trainer_folder(folder: Path) -> LlamaForCausalLM:
    """A checkpoint of the Trainer on one process, after a step of AdamW with random gradients."""
    folder.mkdir(parents=True)
    model = llama()
    params = dict(model.named_parameters())
    decayed, others = ([params[name] for name in group] for group in groups_of(model))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    schedule.step()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    state = {
        "global_step": STEP, "epoch": 0.5, "max_steps": 20, "num_train_epochs": 1, "log_history": [],
        "best_metric": None, "best_global_step": None, "best_model_checkpoint": None, "stateful_callbacks": {},
    }  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return model


def write_zero2_folder(folder: Path) -> dict[str, Tensor]:
    """The same as two processes under ZeRO-2 leave it, as deepspeed/runtime/zero/stage_1_and_2.py lays it out.

    Returns:
        The parameters; exp_avg is 2 and exp_avg_sq 3 times each.
    """
    write_trainer_folder(folder)
    (folder / "optimizer.pt").unlink()
    shards = folder / f"global_step{STEP}"
    shards.mkdir()
    model = llama()
    params = {n: p.detach() for n, p in model.named_parameters()}
    ranks: list[dict[str, Any]] = [
        {"single_partition_of_fp32_groups": [], "group_paddings": [], "zero_stage": 2, "partition_count": [2, 2],
         "base_optimizer_state": {"state": {}, "param_groups": []}} for _ in range(2)
    ]  # fmt: skip
    for i, (names, decay) in enumerate(zip(groups_of(model), (0.1, 0.0), strict=True)):
        flat = torch.cat([params[n].view(-1) for n in names])
        padding = 4 + flat.numel() % 2
        halves = torch.cat([flat, torch.zeros(padding)]).chunk(2)
        for rank, (saved, half) in enumerate(zip(ranks, halves, strict=True)):
            own = padding if rank == 1 else 0
            saved["single_partition_of_fp32_groups"].append(half[: half.numel() - own].clone())
            saved["group_paddings"].append(own)
            base = saved["base_optimizer_state"]
            base["state"][i] = {"step": torch.tensor(10.0), "exp_avg": 2 * half, "exp_avg_sq": 3 * half}
            base["param_groups"].append({"params": [i], "lr": 0.005, "initial_lr": 0.01, "weight_decay": decay})
    for rank, saved in enumerate(ranks):
        torch.save({"optimizer_state_dict": saved}, shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes = [{n: params[n].shape for n in names} for names in groups_of(model)]
    states = {"module": dict(params), "buffer_names": [], "param_shapes": shapes, "ds_config": {}}
    torch.save(states, shards / "mp_rank_00_model_states.pt")
    return params


def write_our_folder(
    folder: Path, model: nn.Module, dtype: torch.dtype, *, step: int = STEP, best: int | None = None
) -> None:
    """A checkpoint of ours: weights in `dtype`, masters in fp32, no optimizer state yet."""
    temporary = folder.parent / f".tmp-{folder.name}"
    (temporary / "state").mkdir(parents=True)
    params: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    save_file({n: p.to(dtype) for n, p in params.items()}, temporary / "model.safetensors", metadata={"format": "pt"})
    save_file({f"master.{n}": p for n, p in params.items()}, temporary / "state/optimizer.safetensors")
    config: Any = model.config
    (temporary / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": str(dtype).partition(".")[2]}))
    (temporary / "tokenizer_config.json").write_text("{}")
    (temporary / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    (temporary / "state/state.json").write_text(json.dumps({"step": step}))
    Writer(memoryview(b"")).commit(
        {"step": step, "dir": temporary, "target": folder, "world_size": 1, "zero_stage": 0, "files": [], "hashed": []}
    )
