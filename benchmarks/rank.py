"""What the ranks of a benchmark share: the run of the product, and clocks that all processes read together."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.train import rank_setup

if TYPE_CHECKING:
    from launcher.train.loop import Run


def read_spec() -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    return spec


def build_product(settings: dict[str, Any]) -> Run:
    """The product, up to the point where `fit` would begin. Collective."""
    rank_setup.before_imports()
    from launcher.base.processes import Processes
    from launcher.config.parse import parse_config
    from launcher.train.accelerator import build_accelerator
    from launcher.train.build import build_run, open_output_dir
    from launcher.train.early_stop import EarlyStop

    config = parse_config(settings)
    accelerator = build_accelerator(config)
    processes = Processes()
    paths, lock = open_output_dir(config, processes)
    return build_run(config, accelerator, processes, paths, lock, EarlyStop(paths, processes, lock), {})


def finish(spec: dict[str, Any], found: dict[str, Any]) -> None:
    """Hands the main process's findings to the benchmark and ends the rank."""
    if rank_setup.rank() == 0:
        Path(spec["result"]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def lost(interval_s: float, usual_s: list[float]) -> float:
    """What a step took beyond the usual one."""
    return interval_s - statistics.median(usual_s)


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process now, by kind, and its peak since `reset_peak_memory`."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")
