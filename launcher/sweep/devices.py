"""Which devices a job of a sweep may use: disjoint sets, one per slot. Imports no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from launcher.base.devices import num_cores, visible_gpus
from launcher.base.errors import ConfigError


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time; `env` confines the job to its devices."""

    index: int
    devices: str
    env: dict[str, str] = field(default_factory=dict)


def make_slots(num_slots: int | None, num_processes: int | None) -> list[Slot]:
    """Device sets for the jobs: disjoint, unless more jobs at once were asked for than fit apart.

    Args:
        num_slots: jobs at once; None: as many as fit.
        num_processes: of one job, the largest of the sweep; None: a job takes all GPUs of its slot, or one core.

    Raises:
        ConfigError: one job asks for more GPUs than are visible.
    """
    gpus = visible_gpus()
    if not gpus:
        return _cpu_slots(num_slots, num_processes or 1)
    if num_processes is None:
        num_processes = len(gpus) // min(num_slots or 1, len(gpus))
    if num_slots is None:
        num_slots = max(1, len(gpus) // num_processes)
    if num_processes > len(gpus):
        raise ConfigError(
            [
                f"launch.num_processes={num_processes} of a job need as many GPUs, {len(gpus)} are visible. "
                f"Set launch.num_processes={len(gpus)}"
            ]
        )
    groups = len(gpus) // num_processes
    most = math.ceil(num_slots / groups)  # beyond 1 the jobs share: small models leave most of a GPU idle
    shared = f", shared by up to {most} jobs" if most > 1 else ""
    slots = []
    for i in range(num_slots):
        first = i % groups * num_processes
        devices = ",".join(gpus[first : first + num_processes])
        slots.append(Slot(i, f"GPU {devices}{shared}", {"CUDA_VISIBLE_DEVICES": devices}))
    return slots


def _cpu_slots(num_slots: int | None, num_processes: int) -> list[Slot]:
    num_slots = num_slots or max(1, num_cores() // num_processes)
    env = {}
    if "OMP_NUM_THREADS" not in os.environ:  # each job would otherwise take a thread for every core
        env["OMP_NUM_THREADS"] = str(max(1, num_cores() // (num_slots * num_processes)))
    return [Slot(i, f"CPU slot {i}", env) for i in range(num_slots)]
