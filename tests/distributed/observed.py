"""An optimizer that watches its run, chosen by `optim.name`: it writes what each step takes and what loading costs.

Into OBSERVED_DIR, one file for each rank and world size: a line {"step", "ids"} for every micro-batch that the loop
collates, and a line {"peak", "share", "largest"}, in bytes, for `load_state`: what this process's memory holds at its
highest beyond what it held before, the masters that are loaded into included; this process's share of the state; and
its largest tensor.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint import rng
from launcher.train import step as training_step
from launcher.train.accelerator import LauncherAccelerator


def _tell(line: dict[str, Any]) -> None:
    name = f"world-{os.environ.get('WORLD_SIZE', 1)}-rank-{os.environ.get('RANK', 0)}.jsonl"
    with (Path(os.environ["OBSERVED_DIR"]) / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _watch_samples() -> None:
    collate, seed_step = training_step.collate, rng.seed_step
    current = [0]

    def watched_seed(seed: int, rank: int, step: int) -> None:
        current[0] = step
        seed_step(seed, rank, step)

    def watched_collate(dataset: Any, ids: Any, *rest: Any) -> Any:
        _tell({"step": current[0] + 1, "ids": [int(i) for i in ids]})
        return collate(dataset, ids, *rest)

    rng.seed_step, training_step.collate = watched_seed, watched_collate


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _watch_memory() -> None:
    load_state = LauncherAccelerator.load_state

    def watched(self: LauncherAccelerator, *args: Any, **kwargs: Any) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what is loaded takes new memory, not what was freed before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of now
        before = _memory("VmRSS")
        load_state(self, *args, **kwargs)
        peak = _memory("VmHWM") - before
        segments = self._training_state.trained.segments
        masters = sum(s.master.numel() * 4 for s in segments)
        states = sum(t.numel() * t.element_size() for s in segments for t in s.elementwise().values())
        largest = max(info.numel for info in self._training_state.trained.params) * 4
        _tell({"peak": peak + masters, "share": masters + states, "largest": largest})

    LauncherAccelerator.load_state = watched  # type: ignore[method-assign]


_watch_samples()
_watch_memory()


class ObservedAdamW(torch.optim.AdamW):
    """AdamW; importing it has done the rest."""
