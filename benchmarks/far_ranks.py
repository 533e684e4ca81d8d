"""Ranks of large: a run that stands at a given step with all that it logged on the way; and its resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.rank import build_product, finish, read_spec


def line(step: int) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 512, "loss": 2.0 + 1 / step, "learning_rate": 5e-5, "grad_norm": 1.25,
        "tokens_per_second": 1234.5, "num_tokens": 32 * step, "memory_bytes": 10**9,
    }  # fmt: skip


def main() -> None:
    spec = read_spec()
    run = build_product(spec["settings"])
    from launcher.saving.log_history import LogHistory
    from launcher.train import loop

    if spec["kind"] == "save":
        loop.train(run)  # the optimizer has its states then
        progress = run.state.progress
        progress.step = spec["step"]
        lines = [line(step) for step in range(10, spec["step"] + 1, 10)]
        progress.log_history = LogHistory(lines)
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        (Path(spec["settings"]["output_dir"]) / "metrics.jsonl").write_text(text)
        run.saver.save()
        run.saver.wait()
        run.saver.close()
    else:
        assert run.step == spec["step"], f"resumed at {run.step}"
        loop.train(run)
    finish(spec, {"seconds": time.time() - spec["started"]})


if __name__ == "__main__":
    main()
