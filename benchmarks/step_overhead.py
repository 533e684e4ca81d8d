"""What the product's loop adds to a step, beside a bare Accelerate loop over the same model: at most 2 % at 20 ms.

    python benchmarks/step_overhead.py [--quick] [--json FILE]

Blocks of steps of both loops alternate in one process group on one model, so that neither has the quieter moment; the
figures are the medians of blocks. One row of 32 tokens per process and step: the smallest step there is, hence the
largest share that a fixed cost can have.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MODEL,
    RECORDS_DIR,
    SMALL_MODEL,
    STEP_20_MS_MODEL,
    Spread,
    machine,
    report,
    run_settings,
    start_ranks,
    table,
)  # fmt: skip

_CASES = [
    ("8.8 M", STEP_20_MS_MODEL, 1), ("8.8 M", STEP_20_MS_MODEL, 2), ("small, 0.9 M", SMALL_MODEL, 1),
    ("small, 0.9 M", SMALL_MODEL, 2), ("74.5 M", MODEL, 2),
]  # fmt: skip


def measure(work_dir: Path, is_quick: bool, num_cases: int) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(work_dir), "cases": []}
    for i, (name, model, num_processes) in enumerate(_CASES[: 2 if is_quick else num_cases]):
        folder = work_dir / str(i)
        folder.mkdir()
        spec = {
            "work_dir": str(folder), "settings": run_settings(folder / "run", model, "ddp", num_processes),
            "num_blocks": 2 if is_quick else 20, "num_steps": 6 if model is MODEL else 30,
        }  # fmt: skip
        values = start_ranks("overhead_ranks", num_processes, spec)
        found["cases"].append({"model": name, "num_processes": num_processes, **values})
    return found


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        ours, bare = Spread.of(case["ours"]), Spread.of(case["bare"])
        pairs = Spread.of([o / b for o, b in zip(case["ours"], case["bare"], strict=True)])
        added = Spread.of([o - b for o, b in zip(case["ours"], case["bare"], strict=True)])
        rows.append(
            [
                case["model"],
                str(case["num_processes"]),
                ours.text(1e3, 1),
                bare.text(1e3, 1),
                added.text(1e3, 1),
                pairs.text(),
            ]
        )
    head = ["model", "processes", "launcher, ms per step", "bare Accelerate, ms per step", "added, ms", "ratio"]
    return f"Median (lowest to highest, number of blocks); strategy ddp.\n\n{table(head, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute, few repetitions")
    parser.add_argument("--cases", type=int, default=len(_CASES), help="only the first so many")
    parser.add_argument(
        "--json", type=Path, default=RECORDS_DIR / "step_overhead.json", help="where the raw numbers go"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        found = measure(Path(name), arguments.quick, arguments.cases)
    report("step_overhead", found, f"{found['machine']}\n\n{as_text(found)}", arguments.json)


if __name__ == "__main__":
    main()
