"""Promise 8: a checkpoint folder is what `save_pretrained` would have written, the same before and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.config.compose import compose
from launcher.data import build_data, build_tokenizer, collate
from launcher.data.tokenizer import byte_tokenizer
from launcher.model.loss import summed_loss
from tests.architectures import ARCHITECTURES, model_config
from tests.distributed.runs import Lab, lines

_GENERATION = {"eos_token_id": [257, 256], "temperature": 0.7, "do_sample": True, "top_p": 0.9, "max_new_tokens": 5}
_SIZES = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2}
_DEFAULT = {("ernie4_5_moe", "zero2"), ("deepseek_v3", "zero3"), ("gpt2", "single")}


def pretrained(folder: Path, name: str) -> Path:
    """A model to fine-tune, with a generation config of its own."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(name)), dtype=torch.float32)
    for param in model.parameters():
        param.data.add_(0.02 * torch.randn_like(param))  # no two alike, those that begin at 0 or 1 neither
    for buffer_name, buffer in model.named_buffers():
        if buffer_name in model.state_dict():
            buffer.data.add_(torch.randn_like(buffer))
    model.generation_config = GenerationConfig(**_GENERATION)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def like(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def check_folder(checkpoint: Path, base: Path, again: Path, dtype: str) -> Any:
    """Compares a checkpoint with what transformers makes of it; returns the model."""
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(again)
    ours, theirs = stored(checkpoint), stored(again)
    assert like(ours) == like(theirs)
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    assert set(ours) == set(stored(base))
    assert files.read_json(checkpoint / "config.json") == files.read_json(again / "config.json")
    generation = files.read_json(checkpoint / "generation_config.json")
    assert generation == files.read_json(again / "generation_config.json")
    assert {k: generation[k] for k in _GENERATION} == _GENERATION
    return model


def eval_loss(model: Any, overrides: list[str]) -> float:
    config = compose(overrides)
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
    assert data.eval is not None
    total, count = 0.0, 0
    model.eval()
    for i in range(len(data.eval)):
        batch = collate(data.eval, torch.tensor([i]).numpy(), tokenizer.pad_token_id)
        with torch.no_grad():
            loss, labelled, _ = summed_loss(model, batch)
        total, count = total + float(loss), count + int(labelled)
    return total / count


def check(lab: Lab, folder: Path, name: str, strategy: str, dtype: str) -> RunPaths:
    """Two steps from the pretrained model and a save; another start, two more and a save."""
    base = pretrained(folder / "base", name)
    more = [
        "model=pretrained", f"model.model_name_or_path={base}", f"model.dtype={dtype}", "checkpoint.save_steps=2",
        "model.attn_implementation=eager", "train.train_batch_size=4", "eval.eval_strategy=steps", "eval.eval_steps=2",
        f"data.eval_files=[{lab.folder / 'rows.jsonl'}]", "eval.per_device_eval_batch_size=8",
    ]  # fmt: skip
    lab.run(folder / "run", strategy, _SIZES[strategy], *more, "train.max_steps=2")
    run = lab.run(folder / "run", strategy, _SIZES[strategy], *more, "train.max_steps=4")
    measured = {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}
    assert measured[4] < measured[2], "nothing was learned after the resume"
    for step in (2, 4):
        checkpoint = run.checkpoint_dir(step)
        model = check_folder(checkpoint, base, folder / f"again-{step}", dtype)
        found = eval_loss(model, lab.overrides(run.root, strategy, *more))
        assert found == pytest.approx(measured[step], rel=1e-5 if dtype == "float32" else 2e-2)
    first, second = run.checkpoint_dir(2), run.checkpoint_dir(4)
    beside = {p.name for p in first.iterdir() if p.is_file()} - {"manifest.json", "trainer_state.json"}
    assert beside == {p.name for p in second.iterdir() if p.is_file()} - {"manifest.json", "trainer_state.json"}
    for file in beside - {"model.safetensors"}:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    a, b = stored(first), stored(second)
    assert like(a) == like(b)
    return run


def _cases() -> list[Any]:
    cases = [(name, strategy) for name in ARCHITECTURES for strategy in ("single", "zero2", "zero3")]
    return [pytest.param(*case, marks=() if case in _DEFAULT else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "strategy"), _cases())
def test_checkpoints_are_those_of_save_pretrained(lab: Lab, tmp_path: Path, name: str, strategy: str) -> None:
    """In bfloat16, where some parameters and buffers stay float32."""
    check(lab, tmp_path, name, strategy, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [("qwen3_moe", "ddp"), ("mixtral", "zero3"), ("llama_tied", "zero2")])
def test_logits_of_a_checkpoint_are_those_of_the_trained_model(
    lab: Lab, tmp_path: Path, name: str, strategy: str
) -> None:
    """In float32, where the two differ by the order of sums alone."""
    check(lab, tmp_path, name, strategy, "float32")
