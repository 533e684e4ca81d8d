"""Everything that `launcher plan` says, as plain data: memory for each strategy, checkpoints, disk, and time."""

from __future__ import annotations

import math
from typing import Any

from launcher.config.settings import RunConfig, StrategyConfig
from launcher.data import build_tokenizer
from launcher.model.memory.devices import find_device
from launcher.model.memory.plan import MemoryModel, StrategyPlan
from launcher.model.memory.strategies import host_bytes
from launcher.saving.checkpoint_size import CheckpointSize, checkpoint_size, disk_bytes, num_saves


def make_plan(
    config: RunConfig, *, num_processes: int, given_device_bytes: int | None, has_data: bool, mtbf_s: float | None,
    tokens_per_s: float | None, disk_bytes_per_s: float, upload_bytes_per_s: float,
) -> dict[str, Any]:  # fmt: skip
    """The plan of a config; see docs/plan.md for its keys.

    Raises:
        UserError: the model's config cannot be read. ConfigError: settings are refused.
    """
    device = find_device(num_processes, config.launch.num_machines, given_device_bytes)
    memory = MemoryModel(config, device, num_processes, build_tokenizer(config) if config.model.config else None)
    plans = [memory.plan(name) for name in memory.strategies()]
    chosen = memory.choose(plans)
    stage = StrategyConfig(chosen.name).zero_stage
    size = checkpoint_size(config, memory.model, memory.states, zero_stage=stage, num_processes=num_processes)
    steps = config.train.max_steps if config.train.max_steps >= 0 else None
    sizes = memory.sizes
    return {
        "num_parameters": sizes.total,
        "num_trainable_parameters": sizes.trained,
        "num_processes": num_processes,
        "strategy": chosen.name,
        "per_device_train_batch_size": memory.micro_batch,
        "max_length": config.data.max_length,
        "device": {"kind": device.kind, "bytes": device.num_bytes, "usable_bytes": int(device.usable_bytes),
                   "source": device.source},
        "memory_bytes_per_device": chosen.parts.to_dict(),
        "host_bytes_per_process": dict(host_bytes(sizes, memory.setting(chosen.name), memory.snapshot_bytes())),
        "strategies": [_entry(plan) for plan in plans],
        "checkpoint_bytes": {"model": size.model, "state": size.state, "total": size.total,
                             "masters": size.masters, "optimizer": size.optimizer},
        "disk_bytes": disk_bytes(config, size.total, size.model, steps),
        "num_checkpoints": num_saves(config, steps),
        **_times(config, size, steps, mtbf_s, tokens_per_s, disk_bytes_per_s, upload_bytes_per_s),
        "notices": [*memory.notices, *([] if has_data else ["no data is named: the number of steps is not known"])],
    }  # fmt: skip


def _entry(plan: StrategyPlan) -> dict[str, Any]:
    return {
        "name": plan.name, "total": round(plan.parts.total), "fits": plan.fits,
        "max_per_device_train_batch_size": plan.largest_micro_batch,
        "memory_bytes": plan.parts.to_dict(), "snapshot_bytes": round(plan.host),
    }  # fmt: skip


def _times(
    config: RunConfig, size: CheckpointSize, steps: int | None, mtbf_s: float | None, tokens_per_s: float | None,
    disk_bytes_per_s: float, upload_bytes_per_s: float,
) -> dict[str, Any]:  # fmt: skip
    save_s = size.total / disk_bytes_per_s
    mtbf = mtbf_s or config.checkpoint.mtbf_s
    tokens = None if steps is None else steps * config.train.train_batch_size * config.data.max_length
    return {
        "save_s": round(save_s, 3),
        "upload_s": round(size.total / upload_bytes_per_s, 3),
        "recommended_save_every_s": round(math.sqrt(2 * mtbf * save_s), 1),
        "mtbf_s": mtbf,
        "num_steps": steps,
        "max_tokens": tokens,
        "train_s": round(tokens / tokens_per_s, 1) if tokens is not None and tokens_per_s else None,
    }
