"""What a base model is: found by content, whatever its folder and its shards are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.model.identity import identity


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    tensors = {f"layers.{i}.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_identity_is_the_same_when_the_folder_is_renamed_and_its_weights_are_sharded(base: Path) -> None:
    before = identity(base)
    other = base.with_name("another-name")
    shutil.copytree(base, other)
    assert identity(other) == before is not None
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        weight_map[name] = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensor}, other / weight_map[name], {"format": "pt"})
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert identity(other) == before
    (other / "model-00002-of-00003.safetensors").unlink()
    assert identity(other) is None, "a shard is not there (yet)"


def test_identity_differs_when_weights_or_config_differ(base: Path) -> None:
    before = identity(base)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "layers.1.weight": tensors["layers.1.weight"] * 1.001}, base / "model.safetensors")
    changed = identity(base)
    assert changed != before
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9", "_name_or_path": "x"}))
    assert identity(base) == changed, "by whom it was written does not matter"
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert identity(base) != changed


def test_identity_differs_when_a_pickled_model_differs(base: Path) -> None:
    weights = base / "pytorch_model.bin"
    (base / "model.safetensors").rename(weights)
    before = identity(base)
    content = bytearray(weights.read_bytes())
    content[-2000] ^= 1
    weights.write_bytes(content)
    assert identity(base) != before is not None
