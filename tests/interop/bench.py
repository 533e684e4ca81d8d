"""The same training by transformers' Trainer and by ours, to be compared step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.base import json_lines
from launcher.base.paths import RunPaths
from tests.distributed.zygote import ROOT, Zygote, environment

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
NUM_STEPS = 20


class Bench:
    """Every run is of NUM_STEPS steps of 4 samples, with warm-up, cosine schedule, weight decay and clipping."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
        rows = [{"text": " ".join(words[(i * j + j) % 8] for j in range(3 + i % 4))} for i in range(60)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def overrides(self, output_dir: Path, *more: str) -> list[str]:
        model = [] if any(o.startswith("model.model_name_or_path") for o in more) else ["model=tiny_llama"]
        shape = [f"model.config.{k}={str(v).lower()}" for k, v in LLAMA.items()] if model else []
        return [
            *model, *shape,
            f"data.train_files=[{self.folder / 'rows.jsonl'}]", f"data.cache_dir={self.folder / 'cache'}",
            f"train.max_steps={NUM_STEPS}", "train.train_batch_size=4", "train.per_device_train_batch_size=2",
            "train.logging_steps=1", "optim.learning_rate=0.01", "optim.weight_decay=0.1", "scheduler=cosine",
            "scheduler.warmup_steps=3", "checkpoint.save_steps=5", "checkpoint.save_total_limit=null", "tracker=off",
            "launch.num_processes=null", f"output_dir={output_dir}", *more,
        ]  # fmt: skip

    def trainer(
        self, output_dir: Path, *more: str, num_processes: int = 1, stage: int = 0, resume: Path | None = None
    ) -> dict[int, float]:
        """Trains with the Trainer, which saves every 10 steps; its losses by step."""
        settings: dict[str, Any] = {
            "overrides": self.overrides(output_dir, *more), "output_dir": str(output_dir), "save_steps": 10,
            "stage": stage, "resume": str(resume) if resume else None,
        }  # fmt: skip
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [sys.executable, *(start if num_processes > 1 else []), "-m", "tests.interop.trainer_run"]
        if num_processes > 1:
            command[-2:] = ["--module", "tests.interop.trainer_run"]
        done = subprocess.run(
            [*command, json.dumps(settings)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
        assert done.returncode == 0 and lines, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return {step: loss for step, loss, _ in json.loads(lines[-1].removeprefix("LOSSES "))}

    def ours(self, output_dir: Path, *more: str, num_processes: int = 1) -> dict[int, float]:
        """Trains with ours; its losses by step."""
        output_dir.mkdir(parents=True, exist_ok=True)
        log = output_dir / "test.log"
        codes = self.zygote.run(self.overrides(output_dir, *more), num_processes, log)
        assert codes == [0] * num_processes, log.read_text()[-6000:]
        lines = json_lines.read(RunPaths(output_dir).metrics)
        return {line["step"]: line["loss"] for line in lines if "loss" in line}
