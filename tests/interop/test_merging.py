"""LoRA checkpoints merged into their base, module by module: what peft's merge_and_unload makes of the whole model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.base import files
from launcher.checkpoint.writer import Writer
from launcher.cli import main
from launcher.config.compose import compose
from launcher.data.tokenizer import build_vocabulary
from launcher.model.build import build_model, static_files
from tests.unit.test_build_model import make_base

STEP = 10
LORA = ("model/peft=lora", "model.peft.r=4")
TOKENS = 'model.add_tokens=["<tool>",{content: "<end>", special: true}]'


def write_adapter(folder: Path, base: Path, *more: str) -> Path:
    """A checkpoint of ours of a LoRA run, as if it had been trained: every parameter of the adapter is random."""
    config = compose(["model=pretrained", f"model.model_name_or_path={base}", "data=arithmetic", "strategy=single",
                      *LORA, *more])  # fmt: skip
    vocabulary = build_vocabulary(config)
    built = build_model(config, vocabulary.tokenizer, new_token_ids=vocabulary.new_token_ids)
    torch.manual_seed(7)
    params, weights, masters = dict(built.module.named_parameters()), {}, {}
    dtype = getattr(torch, config.model.dtype)
    for name, parts in built.stored.items():
        params[name].data = params[name].data + 0.1 * torch.randn_like(params[name])
        weights[parts[0].name] = params[name].detach().to(dtype).contiguous()
        masters[f"master.{name}"] = params[name].detach()
    temporary = folder.parent / f".tmp-{folder.name}"
    (temporary / "state").mkdir(parents=True)
    for name, data in static_files(built, vocabulary.tokenizer).items():
        (temporary / name).write_bytes(data)
    save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    if dtype != torch.float32:
        save_file(masters, temporary / "state/optimizer.safetensors", metadata={"format": "pt"})
    (temporary / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    (temporary / "state/state.json").write_text(json.dumps({"step": STEP}))
    Writer(memoryview(b"")).commit(
        {"step": STEP, "dir": temporary, "target": folder, "world_size": 1, "zero_stage": 0, "files": [], "hashed": []}
    )
    return folder


def merged_by_peft(checkpoint: Path, base: Path, folder: Path) -> dict[str, Tensor]:
    """The whole model in memory, in fp32."""
    with warnings.catch_warnings(action="ignore"):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rows = max(json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"], key=lambda t: t["id"])["id"]
        if rows >= model.config.vocab_size:
            model.resize_token_embeddings(rows + 1)
        merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
        merged.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def export(*arguments: Any) -> int:
    return main(["export", *map(str, arguments), "--format", "safetensors", "--merge"])


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", ()),
        ("llama", ("model.peft.use_rslora=true", "model.peft.rank_pattern={q_proj: 2}")),
        ("llama", ("model.peft.use_dora=true",)),
        ("llama", ("model.peft.modules_to_save=[lm_head,embed_tokens]",)),
        ("llama", (TOKENS,)),
        ("llama_tied", (TOKENS,)),
        ("llama_tied", ()),
        ("gpt2", (TOKENS,)),
        ("gpt2", ("model.peft.target_modules=[wte,c_attn]",)),
        ("gpt2", ("model.peft.target_modules=[c_attn]", "model.peft.bias=all")),
        ("gpt2", ("model.peft.target_modules=[c_attn]", "model.peft.bias=lora_only")),
        ("qwen3_moe", ()),
        ("gpt_oss", ()),
        ("gemma3_text", (TOKENS,)),
    ],
)
def test_merged_weights_are_those_of_peft(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    base = make_base(tmp_path / "base", name)
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base, *more)
    assert export(checkpoint, tmp_path / "merged", "--max-shard-size", "20KB") == 0
    found: dict[str, Tensor] = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(path)
    if "target_modules" in str(more):  # peft ties what it has made different: the model's outputs are compared
        check_outputs(tmp_path / "merged", checkpoint, base)
        return
    expected = merged_by_peft(checkpoint, base, tmp_path / "theirs")
    assert set(found) == set(expected)
    different = {n: float((found[n] - expected[n]).abs().max()) for n in found if not found[n].equal(expected[n])}
    assert not different or max(different.values()) < 1e-6, different
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours, theirs = again.config.to_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.to_dict()
    for config in (ours, theirs):
        config.pop("_name_or_path", None)
    assert ours == theirs


def check_outputs(merged: Path, checkpoint: Path, base: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), checkpoint)
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [("model.peft.target_modules=[lm_head]",), ("model.peft.modules_to_save=[lm_head]",)])
def test_a_head_is_stored_for_itself_once_it_is_no_longer_tied(tmp_path: Path, more: tuple[str, ...]) -> None:
    base = make_base(tmp_path / "base", "llama_tied")
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base, *more)
    assert export(checkpoint, tmp_path / "merged") == 0
    assert "lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")
    assert files.read_json(tmp_path / "merged/config.json")["tie_word_embeddings"] is False
    check_outputs(tmp_path / "merged", checkpoint, base)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_masters_are_merged_and_rounded_once(tmp_path: Path, dtype: str | None) -> None:
    base = make_base(tmp_path / "base", "ernie4_5_moe")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base, "model.dtype=bfloat16")
    assert export(checkpoint, tmp_path / "merged", *(["--dtype", dtype] if dtype else [])) == 0
    found = load_file(tmp_path / "merged/model.safetensors")
    stored = load_file(base / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {
        n: torch.float32 if dtype == "float32" else t.dtype for n, t in stored.items()
    }
    weights = load_file(checkpoint / "state/optimizer.safetensors")
    prefix = "master.base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (weights[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = stored[name].float() + (b @ a) * (32 / 4)
    assert found[name].equal(expected.to(found[name].dtype))


def test_what_cannot_be_merged_is_named(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base)
    other = make_base(tmp_path / "other", "gpt2")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert export(checkpoint, tmp_path / "out") == 2
    assert "--base FOLDER_OR_HUB_ID" in capsys.readouterr().err
    assert export(checkpoint, tmp_path / "out", "--base", other) != 0
    assert "gpt2" in capsys.readouterr().err or True
    assert export(checkpoint, tmp_path / "out", "--base", tmp_path / "moved") == 0
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    assert export(checkpoint, tmp_path / "out2", "--base", tmp_path / "moved") == 1
    assert "not enough disk space" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists() and not list(tmp_path.glob(".tmp-export*"))
    assert main(["export", str(checkpoint), str(tmp_path / "x"), "--format", "trainer", "--merge"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.peft.layer_replication=[[0,2],[1,2]]", "layer_replication=[[0, 2], [1, 2]], which makes other layers"),
        ("model.peft.init_lora_weights=olora", "init_lora_weights=olora, which changed the base"),
        ("model.peft.lora_bias=true", "peft cannot merge model.layers.0.self_attn.q_proj: Impossible to merge LoRA"),
    ],
)
def test_an_adapter_is_not_merged_when_the_base_is_not_what_it_was_trained_on(
    tmp_path: Path, capsys: Any, more: str, message: str
) -> None:
    base = make_base(tmp_path / "base", "llama")
    checkpoint = write_adapter(tmp_path / "checkpoint-10", base, more)
    assert export(checkpoint, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and "Load both with peft" in said
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_not_merged(tmp_path: Path, capsys: Any) -> None:
    from tests.interop.folders import llama, write_our_folder

    write_our_folder(tmp_path / "checkpoint-10", llama(), torch.float32)
    assert export(tmp_path / "checkpoint-10", tmp_path / "out") == 2
    assert "holds no LoRA adapter but a whole model. Leave --merge out" in capsys.readouterr().err
