"""What a save costs the training: the product beside plain `save_state`, transformers' Trainer and one memory copy.

    python benchmarks/save_stall.py [--quick] [--json FILE] [--work-dir DIR]

A model of 74.5 M parameters in fp32, two processes on the CPU (gloo), ZeRO-2 and ZeRO-3. The stall is what the loop
loses over the save and the step after it: the time from the end of the step before to the end of the step after, less
the usual step. Everything is measured in one go and in turn, first saves left out, the disk at rest before each.
Then what a save costs beside the stall: slower steps during the background write, host memory, disk time; and the time
from the resume command to the end of the first step.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, Spread, machine, report, run_settings, start_ranks, table

Found = dict[str, Any]
_STAGES = (2, 3)
_RATIO_TARGETS = {"trainer": 1 / 10, "plain": 1 / 4, "copy": 2.0}
_NAMES = {
    "ours": "launcher", "copy": "one memory copy of the bytes", "plain": "Accelerate's save_state",
    "trainer": "transformers' Trainer",
}  # fmt: skip


def launches(is_quick: bool) -> list[tuple[str, int]]:
    """Which ranks are started in which order, each with its number of repetitions."""
    if is_quick:
        return [("stall_product", 1), ("stall_trainer", 1)]
    return [("stall_product", 7), ("stall_trainer", 6), ("stall_product", 7)]


def product_spec(work_dir: Path, strategy: str, num_processes: int, num_repetitions: int, **other: Any) -> Found:
    return {
        "work_dir": str(work_dir), "settings": run_settings(work_dir / "run", MODEL, strategy, num_processes),
        "kinds": ["ours", "plain", "copy", "ours"], "num_repetitions": num_repetitions, "num_usual": 4,
        "num_idle_writes": 0, "max_during": 4, "keep": False, **other,
    }  # fmt: skip


def measure_stage(work_dir: Path, stage: int, is_quick: bool) -> Found:
    """The stalls under one ZeRO stage, and (not quick) resumes from what the last run left."""
    found: Found = {}
    order = launches(is_quick)
    last = max(i for i, (module, _) in enumerate(order) if module == "stall_product")
    for i, (module, num_repetitions) in enumerate(order):
        if module == "stall_product":
            more = {"num_idle_writes": 1 if is_quick else 2, "keep": not is_quick} if i == last else {}
            spec = product_spec(work_dir, f"zero{stage}", 2, num_repetitions, **more)
        else:
            spec = {
                "work_dir": str(work_dir), "model": MODEL, "zero_stage": stage, "num_repetitions": num_repetitions,
                "num_usual": 4,
            }  # fmt: skip
        _say(f"ZeRO-{stage}: {module}, {num_repetitions} repetitions")
        for key, value in start_ranks(module, 2, spec).items():
            key = "usual_trainer" if module == "stall_trainer" and key == "usual" else key
            found[key] = found.get(key, []) + value if isinstance(value, list) else value
    if not is_quick:
        found["resume"] = {"ours": [], "plain": []}
        for kind in ("ours", "plain", "plain", "ours", "ours", "plain"):
            _say(f"ZeRO-{stage}: resume, {kind}")
            spec = {"work_dir": str(work_dir), "settings": run_settings(work_dir / "run", MODEL, f"zero{stage}", 2)}
            found["resume"][kind].append(start_ranks("resume", 2, {**spec, "kind": kind})["seconds"])
    return found


def measure_free_core(work_dir: Path, is_quick: bool) -> Found:
    """One process, so that the writer has a core to itself; every step until the write has ended."""
    _say("one process beside a free core")
    spec = product_spec(work_dir, "zero2", 1, 1 if is_quick else 6, kinds=["ours"], max_during=200)
    return start_ranks("stall_product", 1, spec)


def measure(work_dir: Path, is_quick: bool) -> Found:
    found: Found = {"machine": machine(work_dir), "stages": {}}
    for stage in _STAGES:
        folder = work_dir / f"zero{stage}"
        folder.mkdir()
        found["stages"][str(stage)] = measure_stage(folder, stage, is_quick)
    folder = work_dir / "free-core"
    folder.mkdir()
    found["free_core"] = measure_free_core(folder, is_quick)
    return found


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---------------------------------------------------------------------- tables


def stall_rows(stage: str, found: Found) -> Iterator[list[str]]:
    ours = Spread.of(found["ours"]).median
    for kind, name in _NAMES.items():
        spread = Spread.of(found[kind])
        call = Spread.of(found[f"{kind}_call"]).text(1e3, 0) if f"{kind}_call" in found else ""
        ratio, target = "", ""
        if kind != "ours":
            ratio = f"{ours / spread.median:.3f}" if spread.median > 0 else str(math.inf)
            target = f"at most {_RATIO_TARGETS[kind]:g}"
        yield [f"ZeRO-{stage}", name, spread.text(1e3, 0), call, ratio, target]


def cost_rows(where: str, found: Found) -> Iterator[list[str]]:
    own = found["own_bytes"]
    slower = Spread.of([100 * relative for _, relative in found["during_write"]] or [math.nan])
    yield [where, "usual step, ms", Spread.of(found["usual"]).text(1e3, 0)]
    yield [where, "steps during the background write, % slower", slower.text(1, 1)]
    if found["write"]:
        yield [where, "from the save to its commit, training going on, s", Spread.of(found["write"]).text(1, 1)]
    yield [where, "state of one process, MB", f"{own / 1e6:.0f}"]
    yield [where, "host memory that saves keep, of that state", f"{found['memory_ours']['kept'] / own:.2f}"]
    yield [where, "the writer's own memory, MB", f"{found['memory_writer'] / 1e6:.0f}"]
    if found.get("idle_write"):
        yield [
            where,
            "from the save to its commit, training standing still, s",
            Spread.of(found["idle_write"]).text(1, 2),
        ]
        yield [where, "the disk alone: the same bytes written and fsynced, s", Spread.of(found["raw_write"]).text(1, 2)]
    for kind, values in found.get("resume", {}).items():
        name = {"ours": "launcher (every byte verified)", "plain": "Accelerate's load_state"}[kind]
        yield [where, f"resume command to end of first step, {name}, s", Spread.of(values).text(1, 1)]


def as_text(found: Found) -> str:
    stages = found["stages"].items()
    one = next(iter(found["stages"].values()))
    stalls = table(
        ["strategy", "saved by", "stall, ms", "the call alone, ms", "launcher's stall : this", "target"],
        [row for stage, values in stages for row in stall_rows(stage, values)],
    )
    costs = table(
        ["where", "what", "measured"],
        [
            *(row for stage, values in stages for row in cost_rows(f"ZeRO-{stage}, 2 processes", values)),
            *cost_rows("ZeRO-2, 1 process, a core free", found["free_core"]),
        ],
    )
    text = f"{one['num_params'] / 1e6:.1f} M parameters, fp32; {one['total_bytes'] / 1e6:.0f} MB per checkpoint"
    return f"\n{found['machine']}\n{text}. Median (lowest to highest, number).\n\n{stalls}\n\n{costs}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one save of each kind and no resumes")
    parser.add_argument(
        "--json", type=Path, help="where the raw numbers go; default benchmarks/results/save_stall.json"
    )
    parser.add_argument("--work-dir", type=Path, help="a folder on the disk to measure; default: the temporary folder")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work_dir) as name:
        found = measure(Path(name), arguments.quick)
    found["duration_s"] = round(time.monotonic() - started, 1)
    report("save_stall", found, as_text(found), arguments.json)


if __name__ == "__main__":
    main()
