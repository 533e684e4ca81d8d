"""What `auto` means here: the simplest strategy that fits, and the largest micro-batch, by the memory model.

Decided before the accelerator is built, on each process for itself: from the config and the sizes of the devices alone,
so all come to the same; `check_agreement` proves it. A run that goes on with as many processes keeps its own.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from launcher.base import files
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.base.words import size as size_text
from launcher.config.settings import AUTO, STRATEGIES, RunConfig, StrategyConfig
from launcher.data import build_tokenizer


def settle(config: RunConfig) -> RunConfig:
    """The config with `auto` replaced.

    Raises:
        ConfigError: the model's config is wrong. UserError: it cannot be read, or nothing fits.
    """
    is_strategy_open = config.strategy.name == AUTO
    is_batch_open = config.train.per_device_train_batch_size == AUTO
    if not is_strategy_open and not is_batch_open:
        return config
    from launcher.model.memory.devices import find_device
    from launcher.model.memory.plan import MemoryModel

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    before = _strategy_before(config, world_size) if is_strategy_open else None
    if before is not None:
        config = dataclasses.replace(config, strategy=StrategyConfig(before, config.strategy.deepspeed))
        if not is_batch_open:
            return config
    device = find_device(world_size, config.launch.num_machines)
    memory = MemoryModel(config, device, world_size, build_tokenizer(config) if config.model.config else None)
    own = -(-config.train.train_batch_size // world_size)
    plans = [memory.plan(name, 1 if is_batch_open else None) for name in memory.strategies()]
    chosen = memory.choose(plans)
    size = min(max(chosen.largest_micro_batch, 1), own) if is_batch_open else memory.micro_batch
    needed = memory.parts(chosen.name, size).total
    _say(
        f"strategy={chosen.name}, {size} samples per forward and backward: needs {size_text(needed)} of "
        f"{size_text(device.num_bytes)} per process, {device.source}"
        f"{'' if chosen.fits else '. That does not fit; nothing else needs less: launcher plan shows the parts'}"
    )
    train = dataclasses.replace(config.train, per_device_train_batch_size=size) if is_batch_open else config.train
    strategy = StrategyConfig(chosen.name, config.strategy.deepspeed) if is_strategy_open else config.strategy
    return dataclasses.replace(config, train=train, strategy=strategy)


def check_agreement(config: RunConfig, processes: Processes) -> None:
    """All processes have come to the same. Collective.

    Raises:
        UserError: their devices differ.
    """
    told = processes.gather((config.strategy.name, config.train.per_device_train_batch_size))
    if len(set(told)) > 1:
        found = "; ".join(f"rank {rank}: {name}, {size}" for rank, (name, size) in enumerate(told))
        raise UserError(
            f"the processes have devices of different sizes and chose differently ({found}). Name what all are to use: "
            "strategy=zero2 train.per_device_train_batch_size=1"
        )


def _strategy_before(config: RunConfig, world_size: int) -> str | None:
    """What this run used, where it had as many processes."""
    paths = RunPaths(Path(config.output_dir).expanduser())
    run = files.read_json_or(paths.run_state, {})
    if not isinstance(run, dict) or run.get("world_size") != world_size:
        return None
    import yaml

    try:
        name = yaml.safe_load(files.read_text(paths.config))["strategy"]["name"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and name in STRATEGIES else None


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"launcher: auto: {text}", file=sys.stderr, flush=True)
