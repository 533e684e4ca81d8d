"""Tokens that a model did not have: learned, saved with the tokenizer, and the same after a kill."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, tensors
from tests.distributed.test_exact_resume import check_exact
from tests.distributed.test_save_pretrained import pretrained

TOKENS = 'model.add_tokens=["<tool>",{content: "<done>", special: true}]'
LORA = ("model/peft=lora", "model.peft.r=4")
BF16 = ("model.dtype=bfloat16",)
NEW = [264, 265]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: pretrained(folder / name, name) for name in ("llama", "llama_tied", "gpt2", "qwen3_moe")}


def write_calls(path: Path) -> Path:
    source, words = random.Random(4), ["red", "blue", "cat", "dog", "tree"]
    rows = [
        {"prompt": " ".join(source.choices(words, k=3)), "completion": f"<tool>{source.choice(words)}<done>"}
        for _ in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(base: Path, data: Path, *more: str) -> list[str]:
    return ["model=pretrained", f"model.model_name_or_path={base}", f"data.train_files=[{data}]", TOKENS, *more]


def check_folders(run: RunPaths, base: Path, *, is_adapter: bool, dtype: torch.dtype) -> None:
    for folder in (run.root, run.checkpoint_dir(10), run.checkpoint_dir(20)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode("a<tool>b<done>", add_special_tokens=False) == [97, 264, 98, 265]
        with warnings.catch_warnings(action="ignore"):
            model: Any = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(
                folder, dtype=dtype
            )
        rows = model.get_input_embeddings().weight
        assert rows.shape[0] == 266
        ids = torch.tensor([[97, *NEW, 98]])
        assert torch.isfinite(model(input_ids=ids).logits).all()
    first = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    mean = first.double().mean(0).float()
    assert not torch.allclose(rows[264].float(), mean, atol=1e-3), "the new rows were not trained"


_CASES: list[Any] = [
    ("llama", "ddp", 2, (*LORA, *BF16)),
    pytest.param("llama_tied", "zero3", 2, BF16),
    *(
        pytest.param(name, strategy, num, more, marks=pytest.mark.slow)
        for name, strategy, num, more in [
            ("llama", "single", 1, ()),
            ("llama_tied", "single", 1, LORA),
            ("gpt2", "ddp", 3, ()),
            ("llama", "zero2", 2, BF16),
            ("qwen3_moe", "zero2", 3, LORA),
            ("llama", "zero3", 3, ()),
            ("llama", "zero3", 2, (*LORA, *BF16)),
            ("llama_tied", "zero3", 3, LORA),
            ("qwen3_moe", "zero3", 2, BF16),
        ]
    ),
]


@pytest.mark.parametrize(("name", "strategy", "num_processes", "more"), _CASES)
def test_new_tokens_are_learned_and_the_same_after_a_kill(
    lab: Lab,
    tmp_path: Path,
    bases: dict[str, Path],
    name: str,
    strategy: str,
    num_processes: int,
    more: tuple[str, ...],
) -> None:
    data = write_calls(tmp_path / "calls.jsonl")
    run = check_exact(lab, tmp_path, strategy, num_processes, *overrides(bases[name], data, *more))
    dtype = torch.bfloat16 if BF16[0] in more else torch.float32
    check_folders(run, bases[name], is_adapter=bool(set(LORA) & set(more)), dtype=dtype)


def first_rows(run: RunPaths, name: str) -> torch.Tensor:
    """fp32 masters after a step of learning rate 0."""
    found = tensors(run.checkpoint_dir(1))
    return found.get(f"optimizer master.{name}", found.get(name, torch.empty(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_masters_begin_as_fp32_weights_and_the_mean_under_every_strategy(
    lab: Lab, tmp_path: Path, bases: dict[str, Path], name: str
) -> None:
    data, found = write_calls(tmp_path / "calls.jsonl"), {}
    more = (*BF16, "optim.learning_rate=0", "optim.weight_decay=0", "train.max_steps=1", "checkpoint.save_steps=1")
    for strategy, num in (("single", 1), ("ddp", 2), ("zero1", 2), ("zero2", 3), ("zero3", 2)):
        run = lab.run(tmp_path / strategy, strategy, num, *overrides(bases[name], data, *more))
        found[strategy] = first_rows(run, "model.embed_tokens.weight")
    base = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32).get_input_embeddings().weight
    for strategy, rows in found.items():
        assert rows.dtype == torch.float32 and rows[:264].equal(base), strategy
        torch.testing.assert_close(rows[264:], base.mean(0).expand(2, -1), atol=1e-3, rtol=1e-2)
        assert rows[264:].equal(rows[264:].bfloat16().float()), strategy
