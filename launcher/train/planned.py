"""At the end of a run: what `launcher plan` would have said, and what it was. Main process only."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from launcher.base import manifest, words
from launcher.base.errors import LauncherError
from launcher.base.paths import RunPaths
from launcher.config.settings import RunConfig
from launcher.data import build_tokenizer
from launcher.model.memory.devices import find_device
from launcher.model.memory.plan import MemoryModel
from launcher.saving.checkpoint_size import checkpoint_size

WORTH_IT_S = 60.0
"""The plan of a small model takes a second or two: a run that computed for less than this goes without."""

LEAST_SHARE = 0.5
"""Of a process on a CPU, planned: where Python and the libraries are most of it, it says nothing about the plan."""


def compare(config: RunConfig, paths: RunPaths, device: torch.device, num_processes: int) -> dict[str, Any]:
    """Bytes planned and measured: of the memory of this process, and of the newest checkpoint where there is one.

    Returns:
        {memory_bytes: [planned, measured], checkpoint_bytes: [planned, measured]}, where they say something.
    """
    if time.process_time() < WORTH_IT_S:
        return {}
    found = find_device(num_processes, config.launch.num_machines)
    try:
        memory = MemoryModel(config, found, num_processes, build_tokenizer(config) if config.model.config else None)
        held = memory.parts(config.strategy.name, memory.micro_batch).total
    except LauncherError:  # a model that does not run without values
        return {}
    told: dict[str, Any] = {}
    runtime = 0.0
    if device.type != "cuda":  # the whole process counts, with its copy for saves
        held, runtime = held + memory.snapshot_bytes(), float(found.runtime_bytes)
    if held >= LEAST_SHARE * (held + runtime):
        told["memory_bytes"] = [round(held + runtime), _peak_bytes(device)]
    newest = max(paths.checkpoint_dirs(), default=None)
    if newest is not None and (measured := manifest.bytes_of(newest[1])):
        size = checkpoint_size(
            config, memory.model, memory.states, zero_stage=config.strategy.zero_stage, num_processes=num_processes
        )
        told["checkpoint_bytes"] = [size.total, measured]
    return told


def in_words(told: dict[str, Any]) -> list[str]:
    """The line for people."""
    parts = []
    for key, what in (("memory_bytes", "memory of a process"), ("checkpoint_bytes", "checkpoint")):
        if key in told:
            planned, measured = told[key]
            parts.append(
                f"{what} {words.size(planned)} planned, {words.size(measured)} measured ({planned / measured - 1:+.1%})"
            )
    return [f"plan: {'; '.join(parts)}"] if parts else []


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
