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
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.models import make_model, write_documents


def main() -> None:
    import torch

    has_cuda = torch.cuda.is_available()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-sweep-", ignore_cleanup_errors=True) as name:
        found["sweep"] = _sweep(Path(name))
        print(f"sweep: {found['sweep']}", flush=True)
        found["plan"] = _plan(Path(name), "qwen3-0.6b" if has_cuda else "tiny", has_cuda)
        print(f"plan: {found['plan']}", flush=True)
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(json.dumps(found, indent=1))


def _launcher(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *arguments], check=False, capture_output=True, text=True,
        timeout=timeout_s, cwd=ROOT,
    )  # fmt: skip


def _sweep(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    done = _launcher(
        "train", "-m", f"output_dir={folder / 'sweep'}", "sweep.num_slots=2", "launch.num_processes=1",
        "strategy=single", "optim.learning_rate=1e-3,2e-3", "train.max_steps=30",
    )  # fmt: skip
    jobs = [json.loads(p.read_text()) for p in sorted((folder / "sweep").glob("*/run.json"))]
    return {
        "code": done.returncode, "seconds": round(time.perf_counter() - started, 1),
        "states": [job["state"] for job in jobs], "tail": (done.stdout + done.stderr)[-600:] if done.returncode else "",
    }  # fmt: skip


def _plan(folder: Path, name: str, has_cuda: bool) -> dict[str, Any]:
    """Peaks as the allocator counted them, in a run of a few steps each, beside the plan's total."""
    length = 4096 if has_cuda else 256
    model = make_model(name, folder, "cuda" if has_cuda else "cpu")
    data = folder / "documents.jsonl"
    write_documents(data, 50 * length, length)
    results = {}
    for strategy in ("single", "zero2"):
        overrides = [
            f"model.model_name_or_path={model}", "model.dtype=bfloat16", f"data.train_files=[{data}]",
            f"data.max_length={length}", "data.packing=true", "train.train_batch_size=2", f"strategy={strategy}",
            "train.per_device_train_batch_size=2", "train.max_steps=4", "checkpoint=off", "tracker=off",
            "launch.num_processes=1", f"output_dir={folder / strategy}", f"data.cache_dir={folder / 'cache'}",
        ]  # fmt: skip
        planned = _launcher("plan", "--json", *overrides)
        done = _launcher("train", *overrides)
        lines = [json.loads(x) for x in (folder / strategy / "metrics.jsonl").read_text().splitlines()]
        measured = max((line.get("memory_bytes") or 0 for line in lines), default=0)
        total = json.loads(planned.stdout)["memory_bytes_per_device"]["total"] if not planned.returncode else None
        results[strategy] = {
            "planned": total, "measured": measured, "off": total / measured - 1 if total and measured else None,
            "code": done.returncode, "text": (planned.stderr + done.stderr)[-300:] if done.returncode else "",
        }  # fmt: skip
    return results


if __name__ == "__main__":
    main()
