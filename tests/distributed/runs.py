"""Small runs for the tests: their data, their settings, and what to read off them afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from launcher.base import files, json_lines
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.snapshot import OPTIMIZER_STEM, TORCH_DTYPES
from tests.distributed.zygote import Zygote

NUM_ROWS = 37
"""Samples; with 8 of them in a step an epoch ends inside step 5."""
OPTIMIZER = "tests.distributed.faulty.FaultyAdamW"


def write_rows(path: Path, count: int = NUM_ROWS) -> None:
    """Chats of different lengths, the same ones every time."""
    words = ["red", "blue", "cat", "dog", "house", "tree", "ran", "big", "small", "on", "the"]
    source = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, answer = (" ".join(source.choices(words, k=source.randint(2, 6))) for _ in range(2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def settings(data: Path, cache: Path) -> list[str]:
    """Overrides of a run of milliseconds per step: dropout, accumulation, decay groups, a schedule, clipping."""
    return [
        f"data.train_files=[{data}]", f"data.cache_dir={cache}", "data.max_length=64", "model=tiny_llama",
        "model.config.hidden_size=32", "model.config.intermediate_size=48", "model.config.num_hidden_layers=2",
        "model.config.attention_dropout=0.1", "train.train_batch_size=8", "train.per_device_train_batch_size=2",
        "train.max_steps=20", "train.logging_steps=1", "checkpoint.save_steps=10", "checkpoint.save_total_limit=null",
        "optim.learning_rate=1e-2", "optim.weight_decay=0.1", "scheduler=cosine", "scheduler.warmup_steps=3",
        f"optim.name={OPTIMIZER}", "tracker=off", "launch.num_processes=null",
    ]  # fmt: skip


class Lab:
    """Makes runs through the zygote, each in a folder of its own."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self._data = folder / "rows.jsonl"
        write_rows(self._data)

    def overrides(self, output_dir: Path, strategy: str, *more: str) -> list[str]:
        common = settings(self._data, self.folder / "cache")
        if "model=pretrained" in more:
            common = [c for c in common if not c.startswith("model")]
        return [*common, f"output_dir={output_dir}", f"strategy={strategy}", *more]

    def start(
        self, output_dir: Path, strategy: str, num_processes: int, *more: str, env: dict[str, str] | None = None
    ) -> list[int]:
        output_dir.mkdir(parents=True, exist_ok=True)
        return self.zygote.start(
            self.overrides(output_dir, strategy, *more), num_processes, output_dir / "test.log", env
        )

    def run(
        self, output_dir: Path, strategy: str, num_processes: int, *more: str, env: dict[str, str] | None = None
    ) -> RunPaths:
        """Runs to its end; fails with its output where it does not exit 0."""
        codes = self.run_codes(output_dir, strategy, num_processes, *more, env=env)
        assert codes == [0] * num_processes, f"{codes}\n{log_text(output_dir)}"
        return RunPaths(output_dir)

    def run_codes(
        self, output_dir: Path, strategy: str, num_processes: int, *more: str, env: dict[str, str] | None = None
    ) -> list[int]:
        self.start(output_dir, strategy, num_processes, *more, env=env)
        return self.zygote.wait()


def log_text(output_dir: Path) -> str:
    texts = [output_dir / "test.log", *sorted(output_dir.glob("logs/error-rank-*.json"))]
    return "\n".join(p.read_text(errors="replace")[-20_000:] for p in texts if p.is_file())


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def lines(run: RunPaths, key: str = "loss") -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that hold a key, by step."""
    return {line["step"]: line for line in json_lines.read(run.metrics) if key in line}


def losses(run: RunPaths) -> dict[int, float]:
    return {step: line["loss"] for step, line in lines(run).items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the safetensors files of a checkpoint hold."""
    weights = next(folder.glob("*model.safetensors"))
    found = dict(load_file(weights))
    if (folder / "state").exists():
        found |= {f"optimizer {name}": tensor for name, tensor in states(folder).items()}
    return found


def states(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's states and masters of a checkpoint, put together where they are stored in pieces."""
    stored = TensorFiles(folder, OPTIMIZER_STEM)
    found = {}
    for name, spec in stored.specs.items():
        found[name] = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        stored.read_into(name, 0, found[name].view(-1))
    stored.close()
    return found


def state(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = files.read_json(CheckpointPaths(folder).run_state)
    return value


def different(first: Path, second: Path) -> list[str]:
    """Names of the tensors in which two checkpoints are not equal bit for bit."""
    a, b = tensors(first), tensors(second)
    return sorted({*a, *b} - {k for k in a if k in b and a[k].dtype == b[k].dtype and _bits(a[k]).equal(_bits(b[k]))})


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
