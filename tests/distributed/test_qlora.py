"""QLoRA together with what else a run can do, on bitsandbytes' CPU backend; losses against transformers and peft."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.cli import main
from launcher.config.compose import compose
from launcher.data import StepSampler, build_data, build_tokenizer, collate
from launcher.model._bitsandbytes import keep_weights
from tests.distributed.runs import Lab, different, log_text, losses
from tests.distributed.test_exact_resume import check_exact
from tests.distributed.test_new_tokens import LORA, overrides, write_calls
from tests.distributed.test_save_pretrained import pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an optional package"),
]

_KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "skipped": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
    "stored": {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
    "int8": {"load_in_8bit": True},
    "int8_outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.0},
}


def settings(kind: str) -> list[str]:
    def text(value: Any) -> str:
        return "[" + ",".join(value) + "]" if isinstance(value, list) else str(value).lower()

    return [f"model.quantization.{key}={text(value)}" for key, value in _KINDS[kind].items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("base"), "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_loss_is_that_of_transformers_with_bitsandbytes_when_weights_are(
    lab: Lab, base: Path, tmp_path: Path, dtype: str
) -> None:
    """An adapter begins as nothing: the loss of the first step is the quantised model's."""
    for kind, fields in _KINDS.items():
        if kind == "stored" and dtype == "bfloat16":
            continue  # bitsandbytes 0.50.2 has no CPU kernel for it (backends/cpu/ops.py: a reshape fails)
        more = [
            "model=pretrained", f"model.model_name_or_path={base}", *LORA, *settings(kind), "train.max_steps=1",
            "train.per_device_train_batch_size=8", f"model.dtype={dtype}", "model.attn_implementation=sdpa",
            "train.fused_loss=false", "checkpoint=off", "model.peft.lora_dropout=0",
        ]  # fmt: skip
        run = lab.run(tmp_path / kind, "single", 1, *more)
        config = compose(lab.overrides(tmp_path / kind, "single", *more))
        tokenizer = build_tokenizer(config)
        data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
        rows = collate(data.train, StepSampler(len(data.train), 8, config.seed).rows_of_step(0), tokenizer.pad_token_id)
        own = {"bnb_4bit_compute_dtype": dtype, **fields} if "load_in_4bit" in fields else fields
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype), quantization_config=BitsAndBytesConfig(**own), attn_implementation="sdpa"
        )
        keep_weights(model)  # bitsandbytes would round their scales
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            expected = model.eval()(**rows).loss.item()
        assert losses(run)[1] == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-3), kind


@pytest.mark.parametrize(
    ("kind", "strategy", "num_processes", "more"),
    [
        ("nf4", "ddp", 2, ()),
        ("double", "single", 1, ("model.dtype=bfloat16", "model.gradient_checkpointing=true")),
        ("fp4", "ddp", 3, ("model.dtype=bfloat16",)),
        ("int8", "ddp", 2, ("model.dtype=bfloat16",)),
    ],
)
def test_new_tokens_are_learnt_resumed_and_merged_when_the_base_is_quantised(
    lab: Lab, base: Path, tmp_path: Path, kind: str, strategy: str, num_processes: int, more: tuple[str, ...]
) -> None:
    """Killed and continued bit by bit; exported and merged at the end, the adapter on the plain base says the same."""
    wanted = overrides(base, write_calls(tmp_path / "calls.jsonl"), *LORA, *settings(kind), *more)
    run = check_exact(lab, tmp_path, strategy, num_processes, *wanted)
    exported = tmp_path / "exported"
    assert main(["export", str(run.checkpoint_dir(20)), str(exported), "--format", "safetensors", "--merge"]) == 0
    at_end = lab.run(tmp_path / "at_end", strategy, num_processes, *wanted, "model.merge_at_end=true")
    ids = torch.tensor([[97, 264, 98, 265, 99]])
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(run.checkpoint_dir(20), dtype=torch.float32)(ids).logits
        for folder in (exported, at_end.root):
            merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert "quantization_config" not in (folder / "config.json").read_text()
            tolerance = 1e-4 if "bfloat16" not in str(more) else 5e-2
            torch.testing.assert_close(merged(ids).logits, adapted, atol=tolerance, rtol=tolerance)


def test_adapter_goes_on_when_its_base_is_quantised_otherwise(lab: Lab, base: Path, tmp_path: Path) -> None:
    plain = ("model=pretrained", f"model.model_name_or_path={base}", "train.max_steps=3")
    first = lab.run(tmp_path / "first", "ddp", 2, *plain, *LORA, *settings("nf4"))
    again = f"model.adapter_name_or_path={first.root}"
    second = lab.run(tmp_path / "second", "ddp", 2, *plain, again, *settings("int8"))
    assert losses(second)[1] < losses(first)[1]
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), second.root)
    assert torch.isfinite(model(input_ids=torch.tensor([[97, 98]])).logits).all()

    codes = lab.run_codes(first.root, "ddp", 2, *plain, *LORA, *settings("fp4"), "train.max_steps=5")
    assert set(codes) <= {2, -9}, log_text(first.root)
    assert "model.quantization" in log_text(first.root)


def test_a_tokenizer_larger_than_the_embedding_grows_a_quantised_model(
    lab: Lab, base: Path, tmp_path: Path
) -> None:  # fmt: skip
    from launcher.data.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = (
        "model=pretrained", f"model.model_name_or_path={base}",
        f"model.tokenizer_name_or_path={tmp_path / 'tokenizer'}",
        "model.resize_embeddings=true", *LORA, *settings("nf4"), "train.max_steps=2",
    )  # fmt: skip
    run = lab.run(tmp_path / "run", "single", 1, *more)
    exported = tmp_path / "exported"
    assert main(["export", str(run.checkpoint_dir(2)), str(exported), "--format", "safetensors", "--merge"]) == 0
    rows = AutoModelForCausalLM.from_pretrained(exported).get_input_embeddings().weight
    assert rows.shape[0] >= len(tokenizer) and torch.isfinite(rows).all()


@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_what_is_learnt_does_not_depend_on_evaluations(lab: Lab, base: Path, tmp_path: Path, kind: str) -> None:
    more = ("model=pretrained", f"model.model_name_or_path={base}", *LORA, *settings(kind), "train.max_steps=6",
            "data.eval_split=0.2", "checkpoint.save_steps=6", "checkpoint.load_best_model_at_end=false")  # fmt: skip
    plain = lab.run(tmp_path / "plain", "ddp", 2, *more)
    evaluated = lab.run(tmp_path / "evaluated", "ddp", 2, *more, "eval.eval_strategy=steps", "eval.eval_steps=2")
    assert losses(evaluated) == losses(plain)
    assert different(evaluated.checkpoint_dir(6), plain.checkpoint_dir(6)) == []
