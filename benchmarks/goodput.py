"""The share of the time that trains, under failures: a closed form, checked against a simulation event by event.

    python -m benchmarks.goodput [--json FILE]

A run trains for `interval_s`, stands still for `stall_s` while it hands its state over, and trains on while that is
written, which takes `write_s`; only then can a failure fall back on it. Failures come at random with a mean of `mtbf_s`
between them, also during a restart, which takes `restart_s`. A save that blocks is one whose stall is the writing.

Bytes are those of the plans of `benchmarks.scale`; speeds are the constants below, each measured or assumed as it says.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RECORDS_DIR, machine, report, table
from benchmarks.scale import Llama, plan_of

PEAK_FLOPS, MFU = 989e12, 0.40
"""An H100's bf16 without sparsity; assumed share of it."""
TOKENS_PER_STEP = 4_000_000
"""Assumed; Llama 3's at full scale was 4 to 16 million."""
PINNED_COPY_BYTES_PER_S = 20e9
"""Of one process into pinned memory; assumed for PCIe 5."""
WRITE_BYTES_PER_S, PROCESSES_PER_NODE = 5e9, 8
"""Of one node into a parallel file system; assumed."""
SHA256_BYTES_PER_S = 0.62e9
"""One core; measured. Every byte goes through it twice (file and chunk)."""
UPLOAD_BYTES_PER_S = 1e9
"""Of the whole run to the Hub; assumed."""
RESTART_S = 180.0
"""To notice, to get processes again, to load and to compile; assumed."""
GPU_MTBF_S = 50_700 * 3600.0
"""Of one GPU with all around it: 419 interruptions in 54 days on 16,384 (The Llama 3 Herd of Models, section 3.3.4)."""

MODELS = (
    Llama("7B", 8, 4096, 11008, 32, 32, 32000),
    Llama("70B", 64, 8192, 28672, 80, 8, 128256),
    Llama("70B", 512, 8192, 28672, 80, 8, 128256),
    Llama("405B", 512, 16384, 53248, 126, 8, 128256),
    Llama("405B", 1024, 16384, 53248, 126, 8, 128256),
)


@dataclass(frozen=True)
class Saves:
    """How a run saves; see the module. `interval_s` is at least `write_s`: a save waits for the one before."""

    interval_s: float
    stall_s: float
    write_s: float

    @classmethod
    def blocking(cls, interval_s: float, write_s: float) -> Saves:
        return cls(interval_s, write_s, 0.0)


def expected(saves: Saves, mtbf_s: float, restart_s: float) -> float:
    """Share of the time that trains, exact for failures without memory.

    From one checkpoint that is whole to the next takes a cycle without a failure; after a failure a cycle and the time
    of the writing, since the run falls back to where the whole one was begun. Without that time it is Daly's formula
    (A higher order estimate of the optimum checkpoint interval for restart dumps, equation 20).
    """
    cycle = saves.interval_s + saves.stall_s
    after_failure = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((cycle + saves.write_s) / mtbf_s)
    until_whole = -math.expm1(-cycle / mtbf_s) * (mtbf_s * math.exp(restart_s / mtbf_s) + after_failure)
    return saves.interval_s / until_whole


def simulated(saves: Saves, mtbf_s: float, restart_s: float, num_intervals: int, seed: int = 0) -> float:
    """The same from events: training, stalls, the end of writes, failures and restarts, one after the other."""
    source = random.Random(seed)
    now, fails_at = 0.0, source.expovariate(1 / mtbf_s)
    done = whole = 0  # intervals trained and handed over; those that a failure cannot take any more
    writes: list[tuple[float, int]] = []
    while whole < num_intervals:
        ends_at = now + saves.interval_s + saves.stall_s
        while writes and writes[0][0] <= min(ends_at, fails_at):
            whole = writes.pop(0)[1]
        if fails_at < ends_at:
            now, done = fails_at, whole
            writes.clear()
            while True:  # a restart can fail, too
                fails_at = now + source.expovariate(1 / mtbf_s)
                if fails_at > now + restart_s:
                    break
                now = fails_at
            now += restart_s
            continue
        now, done = ends_at, done + 1
        writes.append((now + saves.write_s, done))
    return num_intervals * saves.interval_s / now


def best_interval(stall_s: float, write_s: float, mtbf_s: float, restart_s: float) -> Saves:
    """The interval of which the most of the time trains, by a search over the closed form."""
    lowest = max(1.0, write_s)
    tried = (Saves(lowest * 1.01**i, stall_s, write_s) for i in range(1200))
    return max(tried, key=lambda saves: expected(saves, mtbf_s, restart_s) if saves.interval_s < 30 * mtbf_s else 0.0)


def measure(model: Llama) -> dict[str, Any]:
    plan = plan_of(model, model.num_processes // 2)
    num_bytes = sum(num for *_, num in plan.ranges)
    parameters = sum(info.numel for info in model.params())
    step_s = 6 * parameters * TOKENS_PER_STEP / (model.num_processes * PEAK_FLOPS * MFU)
    written_s = num_bytes * min(PROCESSES_PER_NODE, model.num_processes) / WRITE_BYTES_PER_S
    whole_s = written_s + 2 * num_bytes / SHA256_BYTES_PER_S
    stall_s = num_bytes / PINNED_COPY_BYTES_PER_S
    total = num_bytes * model.num_processes
    found: dict[str, Any] = {
        "model": model.name, "processes": model.num_processes, "bytes_per_process": num_bytes, "step_s": step_s,
        "stall_s": stall_s, "blocking_s": written_s, "whole_s": whole_s, "upload_s": total / UPLOAD_BYTES_PER_S,
    }  # fmt: skip
    for name, mtbf_s in (("measured", GPU_MTBF_S / model.num_processes), ("hourly", 3600.0)):
        ours = best_interval(stall_s, whole_s, mtbf_s, RESTART_S)
        blocking = best_interval(written_s, 0.0, mtbf_s, RESTART_S)
        found[name] = {"mtbf_s": mtbf_s}
        for kind, saves in (("ours", ours), ("blocking", blocking)):
            num = max(2_000, min(40_000, round(3_000 * mtbf_s / saves.interval_s)))
            found[name][kind] = {
                "interval_s": saves.interval_s, "expected": expected(saves, mtbf_s, RESTART_S),
                "simulated": simulated(saves, mtbf_s, RESTART_S, num),
            }  # fmt: skip
    return found


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for case in found["models"]:
        for name in ("measured", "hourly"):
            ours, blocking = case[name]["ours"], case[name]["blocking"]
            rows.append(
                [
                    f"{case['model']} on {case['processes']:,}", f"{case['step_s']:.1f}", f"{case['stall_s']:.1f}",
                    f"{case['blocking_s']:.0f}", f"{case['whole_s']:.0f}", f"{case['upload_s']:,.0f}",
                    f"{case[name]['mtbf_s'] / 3600:,.0f} h", f"{ours['interval_s'] / 60:.1f}",
                    f"{ours['expected']:.2%} ({ours['simulated']:.2%})",
                    f"{blocking['expected']:.2%} ({blocking['simulated']:.2%})",
                ]
            )  # fmt: skip
    head = [
        "model", "step, s", "stall of a save, s", "the same, blocking, s", "until it is whole, s", "upload, s",
        "between failures", "best interval, min", "goodput (simulated)", "blocking saves (simulated)",
    ]  # fmt: skip
    return table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RECORDS_DIR / "goodput.json")
    arguments = parser.parse_args(argv)
    found = {"machine": machine(Path("/")), "models": [measure(model) for model in MODELS]}
    report("goodput", found, as_text(found), arguments.json)


if __name__ == "__main__":
    main()
