"""Large numbers: a billion samples, ten thousand checkpoints, a sweep of a thousand jobs, a resume at step 1,000,000.

    python -m benchmarks.large [--pairs N] [--json FILE]

Each in a process of its own, whose memory is its own; the resumes from step 0 and from step 1,000,000 take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RECORDS_DIR, ROOT, SMALL_MODEL, Spread, machine, report, run_settings, start_ranks, table

_NUM_SAMPLES, _MAX_LENGTH = 10**9, 2048
_NUM_CHECKPOINTS = 10_000
_FAR_STEP = 1_000_000


class Lengths:
    """A billion rows of 8 to 2048 tokens, most of a few hundred: a million drawn ones, shifted from piece to piece."""

    def __init__(self) -> None:
        drawn = np.random.default_rng(1).lognormal(5.6, 0.9, size=1 << 20)
        self._drawn = np.minimum(_MAX_LENGTH, np.maximum(8, drawn.astype(np.int64)))

    def __len__(self) -> int:
        return _NUM_SAMPLES

    def piece(self, start: int, end: int) -> np.ndarray:
        first = (start + (start >> 20) * 7919) & ((1 << 20) - 1)
        return np.take(self._drawn, np.arange(first, first + end - start), mode="wrap")


def order(work_dir: Path) -> dict[str, float]:
    from launcher.data.sampler import StepSampler

    started = time.perf_counter()
    sampler = StepSampler(_NUM_SAMPLES, 512, seed=0)
    for step in (0, 1, _FAR_STEP):
        sampler.rows_of_step(step)
    return {"seconds": time.perf_counter() - started}


def packing(work_dir: Path) -> dict[str, float]:
    from launcher.data.packing import PackPlan
    from launcher.data.sampler import StepSampler

    started = time.perf_counter()
    plan = PackPlan(Lengths(), _MAX_LENGTH)
    planned = time.perf_counter()
    sampler = StepSampler(len(plan), 64, seed=0)
    for step in range(20):
        plan.rows_of(sampler.rows_of_step(step))
    found = {"packs": float(len(plan)), "seconds_per_step_of_64": (time.perf_counter() - planned) / 20}
    return {"seconds": planned - started, "fill": plan.num_tokens / (len(plan) * _MAX_LENGTH), **found}


def checkpoints(work_dir: Path) -> dict[str, float]:
    from launcher.base.manifest import FileEntry, Manifest
    from launcher.base.paths import RunPaths
    from launcher.base.processes import Processes
    from launcher.checkpoint import resume, retention

    names = ("config.json", "model.safetensors", "tokenizer.json", "state/optimizer.safetensors", "state/state.json")
    entries = tuple(FileEntry(name, 0, "0" * 64, ()) for name in names)
    for step in range(1, _NUM_CHECKPOINTS + 1):
        folder = work_dir / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        (folder / "manifest.json").write_bytes(Manifest(step, 1, 0, entries).to_json())
        line = {"step": step, "eval_loss": 1.0}
        (folder / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "log_history": [line]}))
    newest = work_dir / f"checkpoint-{_NUM_CHECKPOINTS}"
    (newest / "state" / "state.json").write_text(json.dumps({"step": _NUM_CHECKPOINTS}))
    (newest / "manifest.json").unlink()
    from launcher.base import manifest

    (newest / "manifest.json").write_bytes(
        manifest.build(newest, step=_NUM_CHECKPOINTS, world_size=1, zero_stage=0).to_json()
    )
    found = {}
    started = time.perf_counter()
    point, _ = resume.find("auto", RunPaths(work_dir), Processes(), lambda folder: folder)
    assert point is not None and point.step == _NUM_CHECKPOINTS
    found["resume_s"] = time.perf_counter() - started
    started = time.perf_counter()
    assert len(retention.our_steps(RunPaths(work_dir))) == _NUM_CHECKPOINTS
    found["retention_s"] = time.perf_counter() - started
    for verb in ("status", "checkpoints"):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "launcher.cli", verb, str(work_dir)], check=True, stdout=subprocess.DEVNULL
        )
        found[f"{verb}_s"] = time.perf_counter() - started
    return found


def sweep(work_dir: Path) -> dict[str, float]:
    rates, seeds = ",".join(f"{i}e-5" for i in range(1, 41)), ",".join(map(str, range(25)))
    started = time.perf_counter()
    from launcher.sweep.jobs import SweepTable
    from launcher.sweep.plan import make_plan
    from launcher.sweep.run import _pending, _write_grid

    arguments = [
        "data=arithmetic", "model=tiny_llama", f"output_dir={work_dir}", f"optim.learning_rate={rates}", f"seed={seeds}"
    ]  # fmt: skip
    plan = make_plan(arguments, None)
    jobs = _write_grid(plan, SweepTable(plan.paths))
    assert len(_pending(plan, jobs, 2)) == 1000
    return {"seconds": time.perf_counter() - started}


PARTS = {"order": order, "packing": packing, "checkpoints": checkpoints, "sweep": sweep}


def run_part(name: str, work_dir: Path) -> dict[str, float]:
    """In a process of its own; with its peak memory."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large", "--part", name, str(work_dir)], cwd=ROOT, check=False, text=True,
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name}: {done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def resumes(work_dir: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds from the command to the end of the first step after a resume."""
    found: dict[str, list[float]] = {"from 0": [], "from 1,000,000": []}
    specs = {}
    for name, step in (("from 0", 1), ("from 1,000,000", _FAR_STEP)):
        folder = work_dir / str(step)
        folder.mkdir()
        settings = run_settings(folder / "run", SMALL_MODEL, "ddp", 1)
        settings["train"] |= {"max_steps": 2_000_000, "logging_steps": 10}
        settings["strategy"] = {"name": "single"}
        specs[name] = {"work_dir": str(folder), "settings": settings, "step": step}
        start_ranks("far_ranks", 1, {**specs[name], "kind": "save"})
    for number in range(pairs):
        for name in list(specs) if number % 2 == 0 else list(specs)[::-1]:
            found[name].append(start_ranks("far_ranks", 1, {**specs[name], "kind": "resume"})["seconds"])
    return found


def measure(work_dir: Path, pairs: int) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(work_dir)}
    for name in PARTS:
        (work_dir / name).mkdir()
        found[name] = run_part(name, work_dir / name)
    found["resumes"] = resumes(work_dir, pairs)
    return found


def as_text(found: dict[str, Any]) -> str:
    far, near = found["resumes"]["from 1,000,000"], found["resumes"]["from 0"]
    listed, packs = found["checkpoints"], found["packing"]
    ratios = Spread.of([a / b for a, b in zip(far, near, strict=True)])
    rows = [
        ["order of a billion samples, three steps", f"{found['order']['seconds']:.2f} s", _memory(found["order"])],
        ["packs of a billion samples, planned", f"{packs['seconds']:.1f} s", _memory(packs)],
        ["packs of a step of 64, found", f"{packs['seconds_per_step_of_64'] * 1e3:.0f} ms", ""],
        ["newest of 10,000 checkpoints found and verified", f"{listed['resume_s']:.2f} s", ""],
        ["which of 10,000 to keep", f"{listed['retention_s']:.2f} s", ""],
        ["launcher status with 10,000 checkpoints", f"{listed['status_s']:.2f} s", ""],
        ["launcher checkpoints with 10,000", f"{listed['checkpoints_s']:.2f} s", ""],
        ["sweep of 1,000 jobs, planned", f"{found['sweep']['seconds']:.2f} s", _memory(found["sweep"])],
        ["resume at step 1,000,000 : at step 1", ratios.text(1, 2), ""],
    ]
    return table(["what", "measured", "peak memory"], rows)


def _memory(part: dict[str, float]) -> str:
    return f"{part['peak_bytes'] / 1e6:.0f} MB"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RECORDS_DIR / "large.json")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        from benchmarks.rank import memory_bytes

        found = PARTS[arguments.part[0]](Path(arguments.part[1]))
        print(json.dumps({**found, "peak_bytes": memory_bytes()["VmHWM"]}))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        result = measure(Path(name), arguments.pairs)
    report("large", result, f"{result['machine']}\n\n{as_text(result)}", arguments.json)


if __name__ == "__main__":
    main()
