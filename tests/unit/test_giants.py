"""Numbers in a config.json that its checkpoint cannot hold, and those that only look so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.model.giants import refuse_giant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(300_000))
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2, "num_experts": 16384, "is_moe": False},  # Doge's default
        {"num_hidden_layers": 24, "num_experts": 4, "shared_expert_intermediate_size": 5632},  # Qwen2-MoE's
        {"text_config": {"num_hidden_layers": 2, "n_routed_experts": 256}},
    ],
)
def test_a_small_model_is_taken_when_its_config_names_large_numbers(folder: Path, config: dict[str, Any]) -> None:
    refuse_giant(config, folder)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 900, "num_experts": 10**6},
        {"text_config": {"n_layer": 10**9}},
    ],
)
def test_a_giant_is_refused_when_its_files_cannot_hold_it(folder: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not fit into"):
        refuse_giant(config, folder)
