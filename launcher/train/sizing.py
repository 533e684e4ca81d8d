"""What `auto` means here, and how much fits: the simplest strategy, the largest micro-batch, by the memory model.

Decided before the accelerator is built, by the main process for all of them; `check_agreement` proves it. A run that
goes on with as many processes keeps its strategy, and one that ran out of memory keeps its smaller batches.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.agent import out_of_memory
from launcher.agent.out_of_memory import BatchSizes
from launcher.base import files
from launcher.base.device_memory import host_bytes
from launcher.base.errors import ConfigError, UserError
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes, ask_main
from launcher.base.words import size as size_text
from launcher.config.settings import AUTO, STRATEGIES, RunConfig, StrategyConfig
from launcher.data import build_tokenizer

if TYPE_CHECKING:
    from launcher.model.memory.devices import Device
    from launcher.model.memory.plan import MemoryModel


@dataclasses.dataclass(frozen=True)
class _Settled:
    """What the main process decided."""

    strategy: str
    train: int
    eval: int
    gradient_checkpointing: bool
    notices: list[str]
    """Nothing of a rank reaches the terminal before output_dir is its own."""


def settle(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with `auto` replaced and within the limits of an earlier start that ran out of memory, and what the
    user should know of that. Collective.

    Raises:
        ConfigError: the model's config is wrong. UserError: it cannot be read.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    settled: _Settled = ask_main(_own_device(config, world_size), lambda devices: decide(config, world_size, devices))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing=settled.gradient_checkpointing),
        train=dataclasses.replace(config.train, per_device_train_batch_size=settled.train),
        eval=dataclasses.replace(config.eval, per_device_eval_batch_size=settled.eval),
        strategy=StrategyConfig(settled.strategy, config.strategy.deepspeed),
    )
    return config, settled.notices


def _own_device(config: RunConfig, world_size: int) -> Device | None:
    """That of this process, where it matters."""
    if AUTO not in (config.strategy.name, config.train.per_device_train_batch_size):
        return None
    from launcher.model.memory.devices import find_device

    return find_device(world_size, config.launch.num_machines)


def decide(config: RunConfig, world_size: int, devices: list[Device | None]) -> _Settled:
    """On the main process: what all use, by the smallest of their devices."""
    paths = RunPaths(Path(config.output_dir).expanduser())
    limit = out_of_memory.limits_for(config, world_size, paths)
    notices: list[str] = []
    asked = config.train.per_device_train_batch_size
    if limit is not None:
        used = BatchSizes(config.train.micro_batch_size, config.eval.per_device_eval_batch_size, *_recompute(config))
        config = _limited(config, limit)
        now = BatchSizes(config.train.micro_batch_size, config.eval.per_device_eval_batch_size, *_recompute(config))
        if change := used.change_to(now):
            notices.append(f"this run once ran out of memory: {change}. To try more again: train.on_out_of_memory=stop")
    known = [device for device in devices if device is not None]
    if known:
        smallest = min(known, key=lambda device: device.num_bytes)
        config = _without_auto(config, world_size, smallest, paths, notices)
    size = config.train.micro_batch_size
    if limit is not None and asked == AUTO:
        size = min(size, limit.train)
    return _Settled(
        config.strategy.name, size, config.eval.per_device_eval_batch_size, config.model.gradient_checkpointing,
        notices,
    )  # fmt: skip


def _recompute(config: RunConfig) -> tuple[bool, bool]:
    return config.model.gradient_checkpointing, True


def _limited(config: RunConfig, limit: BatchSizes) -> RunConfig:
    train, recompute = config.train.per_device_train_batch_size, config.model.gradient_checkpointing
    eval_size = min(config.eval.per_device_eval_batch_size, limit.eval)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, gradient_checkpointing=recompute or limit.gradient_checkpointing),
        train=dataclasses.replace(
            config.train, per_device_train_batch_size=min(train, limit.train) if isinstance(train, int) else train
        ),
        eval=dataclasses.replace(config.eval, per_device_eval_batch_size=eval_size),
    )


def _without_auto(config: RunConfig, world_size: int, device: Device, paths: RunPaths, notices: list[str]) -> RunConfig:
    """Adds to `notices` what was chosen, where the memory decided."""
    from launcher.model.memory.plan import MemoryModel

    is_strategy_open = config.strategy.name == AUTO
    is_batch_open = config.train.per_device_train_batch_size == AUTO
    before = _strategy_before(paths, world_size) if is_strategy_open else None
    if before is not None:
        config = dataclasses.replace(config, strategy=StrategyConfig(before, config.strategy.deepspeed))
        if not is_batch_open:
            return config
    simplest = "single" if world_size == 1 else "ddp"
    if not device.is_cuda and not is_batch_open:
        return dataclasses.replace(config, strategy=StrategyConfig(simplest, config.strategy.deepspeed))
    try:
        memory = MemoryModel(config, device, world_size, build_tokenizer(config) if config.model.config else None)
        return _chosen(config, memory, notices)
    except ConfigError:
        raise
    except UserError as error:
        if is_batch_open:
            raise
        notices.append(f"strategy={simplest}, the simplest: {error}")
        return dataclasses.replace(config, strategy=StrategyConfig(simplest, config.strategy.deepspeed))


def _chosen(config: RunConfig, memory: MemoryModel, notices: list[str]) -> RunConfig:
    """With the simplest strategy that fits, and the largest micro-batch where that is open."""
    is_batch_open, device = config.train.per_device_train_batch_size == AUTO, memory.device
    is_strategy_open, plans = config.strategy.name == AUTO, []
    for name in memory.strategies():
        plans.append(memory.plan(name, 1 if is_batch_open else None))
        if is_strategy_open and plans[-1].fits:
            break
    chosen = memory.choose(plans)
    own = samples_of_a_step(config, memory.num_processes)
    size = min(max(chosen.largest_micro_batch, 1), own) if is_batch_open else memory.micro_batch
    needed = memory.parts(chosen.name, size).total
    host, lack = _on_the_host(config, memory, chosen.name)
    if not chosen.fits:
        lack = ". That does not fit; nothing else needs less: launcher plan shows the parts"
    notices.append(
        f"strategy={chosen.name}, {size} samples per forward and backward: needs {size_text(needed)} of "
        f"{size_text(device.num_bytes)} per process, {device.source}{host}{lack}"
    )
    train = dataclasses.replace(config.train, per_device_train_batch_size=size) if is_batch_open else config.train
    strategy = StrategyConfig(chosen.name, config.strategy.deepspeed) if is_strategy_open else config.strategy
    return dataclasses.replace(config, train=train, strategy=strategy)


def _on_the_host(config: RunConfig, memory: MemoryModel, name: str) -> tuple[str, str]:
    """What all processes of this machine keep in its memory instead of on their devices, and what that lacks."""
    needed = memory.offloaded_bytes(name) * math.ceil(memory.num_processes / config.launch.num_machines)
    if not needed:
        return "", ""
    there = host_bytes()
    lack = "" if needed <= there else ". This host does not have that: launcher plan shows the parts"
    return f", and {size_text(needed)} of {size_text(there)} host memory", lack


def samples_of_a_step(config: RunConfig, world_size: int) -> int:
    """Of one process; of the one that has most."""
    return math.ceil(config.train.train_batch_size / world_size)


def sizes_in_use(config: RunConfig, world_size: int, *, can_recompute: bool) -> BatchSizes:
    """Of a settled config, as the passes really have them: a step may have less than was allowed."""
    own = samples_of_a_step(config, world_size)
    num_micro_steps = math.ceil(config.train.train_batch_size / (world_size * config.train.micro_batch_size))
    return BatchSizes(
        math.ceil(own / num_micro_steps), config.eval.per_device_eval_batch_size,
        config.model.gradient_checkpointing, can_recompute,
    )  # fmt: skip


def check_agreement(config: RunConfig, processes: Processes) -> None:
    """All processes have come to the same. Collective.

    Raises:
        UserError: they were started with different settings.
    """
    told = processes.gather((config.strategy.name, config.train.per_device_train_batch_size))
    if len(set(told)) > 1:
        found = "; ".join(f"rank {rank}: {name}, {size}" for rank, (name, size) in enumerate(told))
        raise UserError(
            f"the processes have devices of different sizes and chose differently ({found}). Name what all are to use: "
            "strategy=zero2 train.per_device_train_batch_size=1"
        )


def _strategy_before(paths: RunPaths, world_size: int) -> str | None:
    """What this run used, where it had as many processes."""
    run = files.read_json_or(paths.run_state, {})
    if not isinstance(run, dict) or run.get("world_size") != world_size:
        return None
    import yaml

    try:
        name = yaml.safe_load(files.read_text(paths.config))["strategy"]["name"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and name in STRATEGIES else None
