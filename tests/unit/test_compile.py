"""Which blocks of a model are compiled, and what is refused."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.model.compile import compile_layers, repeated_layers
from tests.architectures import ARCHITECTURES, model_config
from tests.unit.test_attention import build


def compiled(model: Any, *, is_flat: bool) -> str:
    config = RunConfig()
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), unwrap_model=lambda model: model, autocast=contextlib.nullcontext
    )
    return compile_layers(config, model, accelerator, is_flat=is_flat)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_found_by_their_class(name: str) -> None:
    layers = repeated_layers(build(model_config(name)))
    assert len(layers) == 2
    assert len({type(layer) for layer in layers}) <= 2


@pytest.mark.parametrize(
    "more",
    [
        ("strategy=zero3",),
        ("model=pretrained", "model.model_name_or_path=a/b", "model/peft=lora", "model.quantization.load_in_4bit=true"),
    ],
)
def test_compiling_is_refused_when_it_cannot_work(more: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Set .*train\.torch_compile=false"):
        compose(["train.torch_compile=true", *more])
