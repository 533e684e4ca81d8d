"""Folders of runs and sweeps for the tests of the report, also hostile ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launcher.base.paths import RunPaths

HOSTILE = (
    "</script><script>document.documentElement.dataset.pwned=1</script><img src=x onerror=alert(1)>\"'&\u2028{{7*7}}"
)


def make_run(root: Path, *, run_name: str = "a run", num_steps: int = 200, hostile: str = "") -> RunPaths:
    """A run that was killed once and finished; `hostile` stands in every text of it."""
    paths = RunPaths(root)
    paths.logs_dir.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(
            {"step": step, "epoch": step / 100, "loss": 3 * math.exp(-step / 60), "learning_rate": 1e-3,
             "grad_norm": 1.0, "tokens_per_second": 33_221.0, "num_tokens": step * 100, f"own{hostile}": 1.0}
        )  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": 3 * math.exp(-step / 60), "eval_exact_match": step / num_steps})
            lines.append(
                {"step": step, "checkpoint": f"checkpoint-{step}{hostile}", "save_stall_s": 0.01, "bytes": 10**9}
            )
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    t = 1_700_000_000.0
    events = [
        {"t": t, "event": "start", "attempt": "a"}, {"t": t + 10, "event": "begin", "step": 0},
        {"t": t + 70, "event": "progress", "step": 70},
        {"t": t + 71, "event": "ended", "attempt": "a", "state": "failed", "reason": f"crash{hostile}",
         "text": hostile},
        {"t": t + 80, "event": "start", "attempt": "b"},
        {"t": t + 90, "event": "undone", "losses": [[60, 3 * math.exp(-1)]]},
        {"t": t + 90, "event": "begin", "step": 50},
        {"t": t + 240, "event": "progress", "step": num_steps, "save_s": 3},
        {"t": t + 250, "event": "evaluation", "s": 10}, {"t": t + 251, "event": "end", "state": "finished"},
    ]  # fmt: skip
    paths.timeline.write_text("".join(json.dumps(event) + "\n" for event in events))
    sample = {
        "prompt": f"What is 1 + 1?{hostile}",
        "answer": f"2{hostile}",
        "expected": f"2{hostile}",
        "is_right": True,
    }
    paths.samples.write_text("".join(json.dumps({"step": s, **sample}) + "\n" for s in (50, 100)))
    versions = {"torch": f"2.13{hostile}"}
    about = {"num_parameters": 1_234_567, "versions": versions, "device": f"CPU{hostile}"}
    state = {"state": "finished", "step": num_steps, "total_steps": num_steps, "world_size": 2,
             "host": f"node1{hostile}", "job_id": f"7{hostile}", "about": about,
             "reason": f"x{hostile}", "error": hostile}  # fmt: skip
    paths.run_state.write_text(json.dumps(state))
    config = {"run_name": f"{run_name}{hostile}", "model": {"model_name_or_path": f"org/model{hostile}"},
              f"k{hostile}": hostile, "checkpoint": {"metric_for_best_model": "exact_match", "greater_is_better": None},
              "eval": {"eval_strategy": "steps"}}  # fmt: skip
    paths.config.write_text(json.dumps(config))
    return paths


def make_sweep(root: Path, *, hostile: str = "") -> Path:
    """Twelve jobs over two settings, one of which decides."""
    jobs = {}
    for i in range(12):
        rate, seed = (1e-4, 3e-4, 1e-3, 3e-3)[i % 4], i // 4
        name = f"lr={rate},seed={seed}"
        paths = make_run(root / name, num_steps=20)
        best = 1 / (1 + abs(math.log10(rate) + 3)) + seed * 0.01
        paths.metrics.write_text(
            "".join(json.dumps({"step": s, "eval_exact_match": best * s / 20}) + "\n" for s in range(5, 25, 5))
        )
        state = {"state": "pruned" if i == 3 else "finished", "step": 20, "total_steps": 20}
        paths.run_state.write_text(json.dumps(state))
        jobs[name] = {
            "swept": {f"optim.learning_rate{hostile}": str(rate), "seed": f"{seed}{hostile}"},
            "overrides": [],
        }
    metric = {"key": "eval_exact_match", "is_greater_better": True}
    (root / "sweep.json").write_text(json.dumps({"metric": metric, "jobs": jobs, "info": {"run_name": hostile}}))
    return root
