"""`model.merge_at_end`: the output folder holds the merged model, the checkpoints their adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.base import files
from tests.distributed.runs import Lab
from tests.distributed.test_new_tokens import LORA, overrides, write_calls
from tests.distributed.test_save_pretrained import pretrained


@pytest.mark.parametrize(
    ("name", "strategy", "num_processes"),
    [
        ("llama_tied", "ddp", 2),
        pytest.param("llama", "zero3", 2, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "single", 1, marks=pytest.mark.slow),
    ],
)
def test_output_dir_holds_the_merged_model(
    lab: Lab, tmp_path: Path, name: str, strategy: str, num_processes: int
) -> None:
    base, data = pretrained(tmp_path / "base", name), write_calls(tmp_path / "calls.jsonl")
    more = overrides(base, data, *LORA, "model.merge_at_end=true", "train.max_steps=3")
    run = lab.run(tmp_path / "run", strategy, num_processes, *more)
    assert not list(run.root.glob("adapter_*")) and not list(run.root.glob(".tmp-*"))
    assert (run.checkpoint_dir(3) / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(run.root)
    with warnings.catch_warnings(action="ignore"):
        adapted = AutoPeftModelForCausalLM.from_pretrained(run.checkpoint_dir(3), dtype=torch.float32)
    ids = torch.tensor([[97, 264, 98, 265, 99]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(AutoTokenizer.from_pretrained(run.root)) == 266
    stops = files.read_json(run.root / "generation_config.json")["eos_token_id"]
    assert stops == files.read_json(run.checkpoint_dir(3) / "generation_config.json")["eos_token_id"]
