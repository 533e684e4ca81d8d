"""A micro-batch that does not fit: the run goes on with half of it and the same samples in every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base import files
from tests.distributed.runs import lines, losses
from tests.gpu.start import Runs

_LENGTH = 2048
_MORE = (
    "strategy=single", "launch.num_processes=1", "model.dtype=float32", f"data.max_length={_LENGTH}",
    f"model.config.max_position_embeddings={_LENGTH}", "model.config.hidden_size=512",
    "model.config.intermediate_size=1408", "model.config.num_hidden_layers=6", "model.config.attention_dropout=0.0",
    "train.max_steps=4", "optim.learning_rate=1e-3",
)  # fmt: skip
"""Nearly all of its memory is activations: 0.3 MB a token, beside 0.3 GB."""


def test_a_run_goes_on_with_half_the_micro_batch_when_its_device_is_full(runs: Runs, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i:04d}" * (_LENGTH // 4 - 10)}) + "\n" for i in range(16)))
    more = (*_MORE, f"data.train_files=[{data}]")
    enough = runs.run("enough", *more, "train.per_device_train_batch_size=4")
    needed = max(line["memory_bytes"] for line in lines(enough).values())
    limited = runs.launched(
        "limited", *more, "train.per_device_train_batch_size=8", "optim.name=tests.gpu.little_memory.AdamW",
        "launch.max_restarts=0", env={"MEMORY_BYTES": str(int(1.4 * needed))},
    )  # fmt: skip
    told, run = (limited.root / "test.log").read_text(), files.read_json(limited.run_state)
    assert "with 4 instead of 8 samples per forward and backward; the samples of a step stay the same" in told
    assert (run["state"], run["out_of_memory"]["train"], run["out_of_memory"]["count"]) == ("finished", 4, 1)
    assert losses(limited) == pytest.approx(losses(enough), rel=1e-4)
