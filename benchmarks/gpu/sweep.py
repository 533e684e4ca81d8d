"""A sweep with two jobs at once on one GPU, and `launcher plan` beside the measured peak.

python -m benchmarks.gpu.sweep
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.models import make_model, write_documents

_LIMIT_S = 60.0
"""Of everything here, below that of the part in run.sh: it would end this process before a word was written."""


class _Launcher:
    """Runs commands of the launcher, all of them within one limit."""

    def __init__(self, limit_s: float) -> None:
        self._ends_at = time.monotonic() + limit_s

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *arguments], check=False, capture_output=True, text=True,
            timeout=max(1.0, self._ends_at - time.monotonic()), cwd=ROOT,
        )  # fmt: skip


def main() -> None:
    launcher = _Launcher(_LIMIT_S)  # importing torch counts, too
    import torch

    has_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="gpu-sweep-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = "qwen3-0.6b" if has_cuda else "tiny"
        write_parts({
            "sweep": lambda: _sweep(folder, launcher),
            "plan of single": lambda: _plan(folder, model, "single", launcher, has_cuda=has_cuda),
            "plan of zero2": lambda: _plan(folder, model, "zero2", launcher, has_cuda=has_cuda),
        })  # fmt: skip


def write_parts(parts: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Runs and prints them, and writes $OUT/sweep.json after each; one that fails does not skip the next."""
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, run in parts.items():
        try:
            found[name] = run()
        except Exception as error:
            tail = getattr(error, "stderr", None) or b""  # of a command that ran out of time: bytes, even of text
            found[name] = {"error": f"{type(error).__name__}: {error}"[-1500:], "tail": str(tail)[-600:]}
        print(f"{name}: {found[name]}", flush=True)
        (out / "sweep.json").write_text(json.dumps(found, indent=1))


def _sweep(folder: Path, launcher: _Launcher) -> dict[str, Any]:
    started = time.perf_counter()
    done = launcher(
        "train", "-m", f"output_dir={folder / 'sweep'}", "sweep.num_slots=2", "launch.num_processes=1",
        "strategy=single", "optim.learning_rate=1e-3,2e-3", "train.max_steps=30",
    )  # fmt: skip
    jobs = [json.loads(p.read_text()) for p in sorted((folder / "sweep").glob("*/run.json"))]
    return {
        "code": done.returncode, "seconds": round(time.perf_counter() - started, 1),
        "states": [job["state"] for job in jobs], "tail": (done.stdout + done.stderr)[-600:] if done.returncode else "",
    }  # fmt: skip


def _plan(folder: Path, name: str, strategy: str, launcher: _Launcher, *, has_cuda: bool) -> dict[str, Any]:
    """The peak as the allocator counted it, in a run of a few steps, beside the plan's total."""
    length = 4096 if has_cuda else 256
    model = make_model(name, folder, "cuda" if has_cuda else "cpu")
    data = folder / "documents.jsonl"
    write_documents(data, 50 * length, length)
    overrides = [
        f"model.model_name_or_path={model}", "model.dtype=bfloat16", f"data.train_files=[{data}]",
        f"data.max_length={length}", "data.packing=true", "train.train_batch_size=2", f"strategy={strategy}",
        "train.per_device_train_batch_size=2", "train.max_steps=4", "checkpoint=off", "tracker=off",
        "launch.num_processes=1", f"output_dir={folder / strategy}", f"data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    planned = launcher("plan", "--json", *overrides)
    done = launcher("train", *overrides)
    lines = [json.loads(x) for x in (folder / strategy / "metrics.jsonl").read_text().splitlines()]
    measured = max((line.get("memory_bytes") or 0 for line in lines), default=0)
    total = json.loads(planned.stdout)["memory_bytes_per_device"]["total"] if not planned.returncode else None
    return {
        "planned": total, "measured": measured, "off": total / measured - 1 if total and measured else None,
        "code": done.returncode, "text": (planned.stderr + done.stderr)[-300:] if done.returncode else "",
    }  # fmt: skip


if __name__ == "__main__":
    main()
