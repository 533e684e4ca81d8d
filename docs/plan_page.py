"""Fills the table of docs/plan.md by the memory model: Llamas from 7B to 405B on 8 to 1,024 GPUs. `make docs`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.base.words import size
from launcher.config.compose import compose
from launcher.config.settings import StrategyConfig
from launcher.model.memory.devices import Device
from launcher.model.memory.plan import MemoryModel
from launcher.saving.checkpoint_size import checkpoint_size

TARGET = Path(__file__).with_name("plan.md")
_GPU = Device("cuda", 80 * 10**9, "80 GB")
_LLAMAS = {
    "7B": (4096, 11008, 32, 32, 32, 32000), "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256), "405B": (16384, 53248, 126, 128, 8, 128256),
}  # fmt: skip
_SETTINGS = (
    "data=arithmetic", "data.max_length=4096", "model.dtype=bfloat16", "model.gradient_checkpointing=true",
    "train.train_batch_size=2048", "train.per_device_train_batch_size=1", "strategy=auto",
)  # fmt: skip
_HEAD = ("model", "GPUs of 80 GB", "simplest strategy that fits", "memory of each",
         "largest micro-batch", "a checkpoint", "host copy of each")  # fmt: skip
_COUNTS = (8, 64, 256, 1024)


def _config(values: tuple[int, ...]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    return {"model_type": "llama", "max_position_embeddings": 8192, **dict(zip(names, values, strict=True))}


def rows() -> Iterator[str]:
    """One for each model and number of GPUs."""
    for name, values in _LLAMAS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(_config(values)), encoding="utf-8")
            config = compose([f'model.model_name_or_path="{folder}"', *_SETTINGS])
            memory = MemoryModel(config, _GPU, 8)
        for count in _COUNTS:
            memory.num_processes = count
            plans = [memory.plan(strategy) for strategy in memory.strategies()]
            chosen = memory.choose(plans)
            stage = StrategyConfig(chosen.name).zero_stage
            saved = checkpoint_size(config, memory.model, memory.states, zero_stage=stage, num_processes=count)
            what = f"`{chosen.name}`" if chosen.fits else "none fits"
            batch = chosen.largest_micro_batch if chosen.fits else "-"
            yield (
                f"| {name} | {count:,} | {what} | {size(chosen.parts.total)} | {batch} | {size(saved.total)} | "
                f"{size(memory.snapshot_bytes())} |"
            )


def filled(page: str) -> str:
    """The page with its table as it should be."""
    table = "\n".join([f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|", *rows()])
    marks = r"(<!-- table: make docs -->\n).*?(<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    TARGET.write_text(filled(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
