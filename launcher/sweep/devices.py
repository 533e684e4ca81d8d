"""Which devices a job of a sweep may use: disjoint sets, one per slot. Imports no torch."""

from __future__ import annotations

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
    """Disjoint device sets for the jobs.

    Args:
        num_slots: jobs at once; None: as many as fit.
        num_processes: of one job, the largest of the sweep; None: a job takes all GPUs of its slot, or one core.

    Raises:
        ConfigError: more GPUs are asked for than are visible.
    """
    gpus = visible_gpus()
    if not gpus:
        return _cpu_slots(num_slots, num_processes or 1)
    if num_processes is None:
        num_processes = len(gpus) // min(num_slots or 1, len(gpus))
    if num_slots is None:
        num_slots = max(1, len(gpus) // num_processes)
    if num_slots * num_processes > len(gpus):
        raise ConfigError(
            [
                f"sweep.num_slots={num_slots} jobs of launch.num_processes={num_processes} need "
                f"{num_slots * num_processes} GPUs, {len(gpus)} are visible. Set "
                f"sweep.num_slots={max(1, len(gpus) // num_processes)}, or fewer processes per job"
            ]
        )
    slots = []
    for i in range(num_slots):
        devices = ",".join(gpus[i * num_processes : (i + 1) * num_processes])
        slots.append(Slot(i, f"GPU {devices}", {"CUDA_VISIBLE_DEVICES": devices}))
    return slots


def _cpu_slots(num_slots: int | None, num_processes: int) -> list[Slot]:
    num_slots = num_slots or max(1, num_cores() // num_processes)
    env = {}
    if "OMP_NUM_THREADS" not in os.environ:  # each job would otherwise take a thread for every core
        env["OMP_NUM_THREADS"] = str(max(1, num_cores() // (num_slots * num_processes)))
    return [Slot(i, f"CPU slot {i}", env) for i in range(num_slots)]
