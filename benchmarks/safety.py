"""What safety costs: the same run with a save every 20 steps and every one of them pushed, against none at all.

    python -m benchmarks.safety [--pairs N] [--json FILE]

8.8 M parameters, 105 MB per checkpoint, on one process beside a free core and on two without one. A server on
this machine that speaks the Hub's protocol takes 20 MB/s; it gets what the runs leave of the cores, since a Hub has
its own. Runs take turns; what is compared are the seconds of all steps after the first twenty, and every run must end
with the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RECORDS_DIR, ROOT, STEP_20_MS_MODEL, Record, Spread, machine, table
from benchmarks.hub_overhead import hub_server

_BYTES_PER_S = 20_000_000
_NUM_STEPS, _EVERY = 160, 20
_TARGETS = {1: 1.03, 2: 1.06}


def run_once(folder: Path, num_processes: int, hub: tuple[str, str] | None) -> dict[str, Any]:
    """Seconds of all windows of 20 steps after the first, and the hash of the model at the end."""
    config = ",".join(f"{key}:{json.dumps(value)}" for key, value in STEP_20_MS_MODEL.items())
    overrides = [
        "data=arithmetic", f"model.config={{{config}}}", f"strategy={'single' if num_processes == 1 else 'ddp'}",
        f"launch.num_processes={num_processes}", f"train.max_steps={_NUM_STEPS}", "train.train_batch_size=16",
        f"train.per_device_train_batch_size={16 // num_processes}", "eval.eval_strategy=no",
        f"train.logging_steps={_EVERY}", "tracker=off", f"output_dir={folder}",
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder.parent / "home")}
    if hub is None:
        overrides.append("checkpoint=off")
    else:
        overrides += [
            "checkpoint=last", f"checkpoint.save_steps={_EVERY}", "hub.push_to_hub=true",
            f"hub.hub_model_id=bench/{folder.name}", "hub.hub_strategy=every_save", "hub.max_wait_s=120",
        ]  # fmt: skip
        env |= {"HF_ENDPOINT": hub[0], "HF_TOKEN": hub[1], "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", *overrides], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}:\n{done.stdout[-4000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    windows = [
        (after["num_tokens"] - before["num_tokens"]) / after["tokens_per_second"]
        for before, after in itertools.pairwise([line for line in lines if "loss" in line])
    ]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    stalls = [line["save_stall_s"] for line in lines if "save_stall_s" in line]
    shutil.rmtree(folder)
    return {"seconds": sum(windows), "weights": weights, "stalls": stalls}


def measure(work_dir: Path, pairs: int, record: Record) -> None:
    for number in range(pairs):
        for num_processes in _TARGETS:
            runs, about = {}, machine(work_dir)
            # A server of its own for each pair: one that has the bytes already would not ask for them.
            with hub_server(work_dir / f"server-{num_processes}-{number}", _BYTES_PER_S) as hub:
                for kind in ("without", "with") if number % 2 == 0 else ("with", "without"):
                    folder = work_dir / f"{kind}-{num_processes}-{number}"
                    runs[kind] = run_once(folder, num_processes, hub if kind == "with" else None)
                    seconds = runs[kind]["seconds"]
                    print(f"{time.strftime('%H:%M:%S')} {kind}, {num_processes} processes: {seconds:.1f} s", flush=True)
            assert runs["with"]["weights"] == runs["without"]["weights"], "saving changed the result"
            values = {kind: run["seconds"] for kind, run in runs.items()}
            record.add(str(num_processes), about, **values, stalls=runs["with"]["stalls"])


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for name, case in found.items():
        ratios = [a / b for a, b in zip(case["with"], case["without"], strict=True)]
        where = "a free core" if name == "1" else "no free core"
        spreads = [Spread.of(case[kind]).text(1, 2) for kind in ("with", "without")]
        rows.append([where, *spreads, Spread.of(ratios).text(), f"{_TARGETS[int(name)]}"])
    head = ["beside", f"{_NUM_STEPS - _EVERY} steps with saves and pushes, s", "without, s", "ratio", "at most"]
    return f"Median (lowest to highest, number of runs).\n\n{table(head, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--add", action="store_true", help="to the pairs that the file has")
    parser.add_argument("--json", type=Path, default=RECORDS_DIR / "safety.json")
    arguments = parser.parse_args(argv)
    record = Record(arguments.json, is_added=arguments.add)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        measure(Path(name), arguments.pairs, record)
    print(f"{machine(ROOT)}, {record.loads()}\n\n{as_text(record.found)}")


if __name__ == "__main__":
    main()
