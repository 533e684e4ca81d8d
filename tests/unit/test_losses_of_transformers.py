"""Our loss of the same rows is transformers' own, for every causal architecture that can be made small: promise 7."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig
from launcher.data.rows import collate, to_device
from launcher.model.attention import Attention, settle_attention
from launcher.model.loss import build_loss, router_coefficient
from tests.every_architecture import NAMES, VOCAB_SIZE, small_model

_CPU = torch.device("cpu")
_LENGTHS = (23, 5, 40)  # one is longer than the windows
_NOT_CAUSAL = {
    "bert": "is_decoder", "bert-generation": "is_decoder", "big_bird": "is_decoder", "camembert": "is_decoder",
    "cpmant": None, "data2vec-text": "is_decoder", "electra": "is_decoder", "ernie": "is_decoder",
    "megatron-bert": "is_decoder", "rembert": "is_decoder", "roberta": "is_decoder",
    "roberta-prelayernorm": "is_decoder", "roc_bert": "is_decoder", "roformer": "is_decoder", "xlm": "causal",
    "xlm-roberta": "is_decoder", "xlm-roberta-xl": "is_decoder", "xlnet": None, "xmod": "is_decoder",
}  # fmt: skip
"""As their configs are, and the field that makes them so."""
_NOT_SHIFTED = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr",
    "whisper", "xlm",
)  # fmt: skip
"""transformers takes the labels of these as they stand, from their time as decoders with an encoder: a position's label
is its own token, so that its Trainer teaches them to copy. Ours is the next token everywhere."""
_NOT_SMALL = 27
"""With encoders of images and sound, or with sizes that do not fit together in tests/every_architecture.py."""


class Rows:
    """Rows of different lengths, all but the first two tokens labelled; as `data.TokenRows` gives them."""

    is_packed = is_rounded = False

    def __init__(self, *, is_flat: bool) -> None:
        self.is_flat = is_flat
        generator = torch.Generator().manual_seed(2)
        self._rows = [torch.randint(3, 250, (length,), generator=generator).numpy() for length in _LENGTHS]

    def segments(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self._rows[i], np.arange(len(self._rows[i])) >= 2)]


def batch(*, is_flat: bool = False) -> dict[str, Any]:
    rows: Any = Rows(is_flat=is_flat)
    return collate(rows, np.arange(len(_LENGTHS)), 0)


def settle(model: Any) -> Attention:
    accelerator = SimpleNamespace(device=_CPU, unwrap_model=lambda model: model, autocast=contextlib.nullcontext)
    return settle_attention(RunConfig(), model, accelerator, VOCAB_SIZE, model.config._attn_implementation)


@torch.no_grad()
def loss_of_transformers(model: Any, kind: str) -> float:
    rows = batch()
    outputs = model(**rows, use_cache=False)
    if kind not in _NOT_SHIFTED:
        return float(outputs.loss)
    labels = rows["labels"][:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels))


def losses(model: Any, loss: Any) -> list[float]:
    """In evaluation and in training, in which some architectures draw random numbers."""
    found = []
    for is_training in (False, True):
        model.train(is_training)
        torch.manual_seed(1)
        found.append(loss())
    return found


def compare(model: Any, kind: str) -> None:
    expected = losses(model, lambda: loss_of_transformers(model, kind))
    attention = settle(model)
    ours, _ = build_loss(model, _CPU, is_fused=True)
    rows = to_device(batch(is_flat=attention.is_flat), _CPU)

    @torch.no_grad()
    def mean() -> float:
        found = ours(model, rows)
        return float(found.loss_sum) / found.num_labelled

    assert losses(model, mean) == pytest.approx(expected, rel=1e-5), (kind, attention)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("kind", ["llama", "phimoe", "whisper", "bart", "opt", "phi3", "mimo_v2_flash"])
def test_loss_is_that_of_transformers_when_the_architecture_is(kind: str) -> None:
    """phimoe has its window in its masks only; bart counts positions and labels in its own way."""
    compare(small_model(kind), kind)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_loss_is_that_of_transformers_when_layers_share_their_keys(kind: str) -> None:
    """Gemma 4 cuts the masks of such layers, which must not be two-dimensional then: its E2B could not be built."""
    own = {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4} if kind == "gemma3n_text" else {}
    layers = ["sliding_attention", "full_attention"] * 2
    compare(small_model(kind, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=layers, **own), kind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_loss_is_that_of_transformers_whatever_the_architecture() -> None:
    num_left_out, problems = 0, {}
    for kind in NAMES:
        model = small_model(kind)
        if model is None or kind in _NOT_CAUSAL:
            num_left_out += model is None
            continue
        try:
            compare(model, kind)
        except Exception as error:
            problems[kind] = repr(error)[:300]
    assert not problems
    assert num_left_out <= _NOT_SMALL


_DBRX = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "resid_pdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.5},
}  # fmt: skip


def with_router_loss(kind: str, **fields: Any) -> tuple[float, float, list[str]]:
    """(transformers' loss, ours, notices) where the config asks for the router loss."""
    if kind == "dbrx":
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_DBRX))
    else:
        model = small_model(kind, **fields)
    model.config.output_router_logits = True
    expected = loss_of_transformers(model.eval(), kind)
    ours, notices = build_loss(model, _CPU, is_fused=True)
    with torch.no_grad():
        found = ours(model, to_device(batch(), _CPU))
    router = 0.0 if found.router_loss is None else router_coefficient(model) * float(found.router_loss)
    return expected, float(found.loss_sum) / found.num_labelled + router, notices


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "mixtral", "gpt_oss", "granitemoe"])
def test_the_router_loss_has_the_weight_that_transformers_gives_it(kind: str) -> None:
    """DBRX names it otherwise, in a part of its config."""
    expected, found, notices = with_router_loss(kind)
    assert found == pytest.approx(expected, rel=1e-5)
    assert notices == []


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_transformers_loss_is_named_when_it_is_not_trained_on() -> None:
    expected, found, notices = with_router_loss("bamba", z_loss_coefficient=0.1)
    assert found < expected * 0.9
    assert len(notices) == 1 and "bamba: transformers has more in the loss" in notices[0]
    assert "z_loss_coefficient=0.1" in notices[0]
    assert with_router_loss("bamba")[2] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["roberta", *(pytest.param(k, marks=pytest.mark.slow) for k in _NOT_CAUSAL)])
def test_architecture_is_refused_when_it_sees_what_it_predicts(kind: str) -> None:
    field = _NOT_CAUSAL[kind]
    cure = f"Set model\\.config\\.{field}=true" if field else r"Train another architecture"
    with pytest.raises(ConfigError, match=rf"{kind} is not causal as it is configured: .*{cure}"):
        settle(small_model(kind))
    if field:
        compare(small_model(kind, **{field: True}), kind)
