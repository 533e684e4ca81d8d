"""QLoRA on bitsandbytes' CPU backend: the base stays as it is, an adapter is trained, and a kill changes nothing."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from tests.distributed.runs import Lab
from tests.distributed.test_exact_resume import check_exact
from tests.distributed.test_save_pretrained import pretrained

LORA = ("model/peft=lora", "model.peft.r=4")
NF4 = ("model.quantization.load_in_4bit=true", "model.quantization.bnb_4bit_quant_type=nf4")
Q = "model.quantization."
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="an optional package: pip install bitsandbytes"
)


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "num_processes", "more"),
    [
        ("single", 1, NF4),
        ("single", 1, ("model.quantization.load_in_8bit=true",)),
        ("ddp", 2, (*NF4, "model.quantization.bnb_4bit_use_double_quant=true", "model.dtype=bfloat16")),
    ],
)
def test_adapters_on_quantised_weights_are_the_same_after_a_kill(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int, more: tuple[str, ...]
) -> None:
    base = pretrained(tmp_path / "base", "llama")
    before = (base / "model.safetensors").read_bytes()
    run = check_exact(lab, tmp_path, strategy, num_processes, "model=pretrained", f"model.model_name_or_path={base}",
                      *LORA, *more)  # fmt: skip
    assert (base / "model.safetensors").read_bytes() == before
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, run.root)
    assert torch.isfinite(model(input_ids=torch.tensor([[97, 98]])).logits).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (NF4, r"only an adapter is trained\. Set model/peft=lora"),
        ((*LORA, *NF4, "strategy=zero2"), r"strategy=zero2 cannot spread quantised weights.*Set strategy=ddp"),
        ((*LORA, *NF4, "strategy=zero3_offload"), r"strategy=zero3_offload cannot spread"),
        ((*LORA, "model.quantization.bnb_4bit_quant_type=nf4"), r"needs one of load_in_4bit and load_in_8bit"),
        ((*LORA, *NF4, "model.quantization.load_in_4bits=true"), r"Did you mean model\.quantization\.load_in_4bit\?"),
        ((*LORA, *NF4, "model.quantization.quant_method=gptq"), r"quant_method must be bitsandbytes \(got 'gptq'\)"),
        ((*LORA, "model.quantization.load_in_4bit=1"), r"load_in_4bit must be true or false \(got 1\)"),
        ((*LORA, "model.quantization.load_in_8bit=yes"), r"load_in_8bit must be true or false \(got 'yes'\)"),
        ((*LORA, *NF4[:1], f"{Q}bnb_4bit_quant_type=NF4"), r"must be one of nf4, fp4 \(got 'NF4'\)"),
        ((*LORA, *NF4, f"{Q}bnb_4bit_compute_dtype=int8"), r"one of bfloat16, float16, float32 \(got 'int8'\)"),
        ((*LORA, *NF4, f"{Q}bnb_4bit_compute_dtype=bf16"), r"one of bfloat16, float16, float32 \(got 'bf16'\)"),
        ((*LORA, *NF4, f"{Q}bnb_4bit_quant_storage=int4"), r"one of uint8, .* \(got 'int4'\)"),
        ((*LORA, f"{Q}load_in_8bit=true", f"{Q}llm_int8_threshold=-1"), r"a number that is not negative \(got -1\)"),
        ((*LORA, *NF4, f"{Q}llm_int8_skip_modules=lm_head"), r"a list of modules' names, as in \[lm_head\]"),
        ((*LORA, *NF4, f"{Q}llm_int8_skip_modules=[3]"), r"a list of modules' names"),
        ((*LORA, f"{Q}load_in_8bit=true", *NF4[1:]), r"bnb_4bit_quant_type has no effect with load_in_8bit\. Leave it"),
        ((*LORA, *NF4, f"{Q}llm_int8_threshold=5"), r"has no effect with load_in_4bit\. .*load_in_8bit=true instead"),
        (
            (*LORA, f"{Q}load_in_8bit=true", f"{Q}llm_int8_enable_fp32_cpu_offload=true"),
            r"every device holds the whole model\. Leave it out",
        ),
    ],
)
def test_contradictions_of_quantisation_are_named(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("launcher.config.quantization_rules.is_installed", lambda module: True)
    with pytest.raises(ConfigError, match=message):
        compose(["model.model_name_or_path=org/name", "data=arithmetic", *overrides])


def test_a_missing_package_is_named_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.config.quantization_rules.is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"not installed: pip install bitsandbytes"):
        compose(["model.model_name_or_path=org/name", "data=arithmetic", *LORA, *NF4])


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_what_a_config_of_transformers_was_written_as_is_taken(monkeypatch: pytest.MonkeyPatch, bits: str) -> None:
    """The quantization_config of a config.json, with all its defaults."""
    from transformers import BitsAndBytesConfig

    from launcher.model.quantization import quantization_arguments

    monkeypatch.setattr("launcher.config.quantization_rules.is_installed", lambda module: True)
    written = json.loads(BitsAndBytesConfig(**{bits: True}).to_json_string(use_diff=False))
    values = ",".join(f"{key}: {json.dumps(value)}" for key, value in written.items())
    config = compose(
        ["model.model_name_or_path=org/name", "data=arithmetic", *LORA, f"model.quantization={{{values}}}"]
    )
    (made,) = quantization_arguments(config).values()
    assert made.to_dict() == BitsAndBytesConfig(**{bits: True}).to_dict()


def test_fields_are_those_of_transformers() -> None:
    import inspect

    from transformers import BitsAndBytesConfig

    from launcher.config.quantization_rules import QUANTIZATION_FIELDS

    theirs = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(QUANTIZATION_FIELDS) - {"quant_method"} == theirs
