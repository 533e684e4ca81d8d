"""Which attention a model is trained with, whether without padding, and that its losses stay what they are."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig
from launcher.model import cpu_attention
from launcher.model.attention import Attention, settle_attention, window_of
from launcher.model.loss import summed_loss
from launcher.model.packing_check import borders_of
from tests.architectures import ARCHITECTURES, model_config

_OURS, _FLAT = cpu_attention.NAME, Attention(cpu_attention.NAME, is_flat=True)
_ELSE = {
    "gpt_oss": Attention("eager", is_flat=False),  # sinks
    "bloom": Attention("eager", is_flat=False),  # alibi
    "falcon": Attention("sdpa", is_flat=False),
    "mamba2": Attention("eager", is_flat=False),
    "lfm2": Attention(_OURS, is_flat=False),  # a convolution runs over the borders of rows
    "nemotron": Attention(_OURS, is_flat=False),  # its layers are not given the borders
}  # fmt: skip
_NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "opt": {"dropout": 0.0},
}  # fmt: skip
_LENGTHS = (23, 5, 40)


def build(config: dict[str, Any], **arguments: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **arguments)


def settle(model: Any, *, packing: bool = False, known: dict[str, Any] | None = None, **data: Any) -> Attention:
    config = RunConfig()
    config.data.packing = packing
    for name, value in data.items():
        setattr(config.data, name, value)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), unwrap_model=lambda model: model, autocast=contextlib.nullcontext
    )
    return settle_attention(config, model, accelerator, 256, model.config._attn_implementation, known)


def loss_and_gradients(model: Any, *, is_flat: bool, lengths: tuple[int, ...] = _LENGTHS) -> tuple[float, torch.Tensor]:
    """Of the same rows, padded or one after another."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 250, (length,), generator=generator) for length in lengths]
    if is_flat:
        labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
        batch = {"input_ids": torch.cat(rows)[None], "labels": torch.cat(labels)[None], **borders_of(lengths)}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        batch = {"input_ids": ids, "labels": ids.where(mask, -100), "attention_mask": mask.long()}
    model.zero_grad()
    loss = summed_loss(model, batch).loss_sum
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_stay_the_same_when_attention_and_batches_are_ours(name: str) -> None:
    model = build(model_config(name) | _NO_DROPOUT.get(name, {}))
    model.train()
    expected = loss_and_gradients(model, is_flat=False)
    attention = settle(model)
    assert attention == _ELSE.get(name, _FLAT)
    assert model.config._attn_implementation == attention.name
    assert model.training
    found = loss_and_gradients(model, is_flat=attention.is_flat)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() <= 1e-4 * expected[1].norm()


def test_softcap_and_windows_are_followed_when_rows_are_longer_than_the_window() -> None:
    config = model_config("gemma3_text") | {"sliding_window": 7, "attn_logit_softcapping": 3.0}
    config |= {"layer_types": ["sliding_attention", "full_attention"]}
    for kind in ("gemma2", "gemma3_text"):
        model = build(config | {"model_type": kind, "initializer_range": 0.5}, attn_implementation="eager")
        expected = loss_and_gradients(model, is_flat=False)
        assert settle(model) == _FLAT
        found = loss_and_gradients(model, is_flat=True)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert (found[1] - expected[1]).norm() <= 1e-4 * expected[1].norm()


@pytest.mark.parametrize("packing", [False, True])
def test_sdpa_stays_when_attention_has_dropout(packing: bool) -> None:
    model = build(model_config("llama") | {"attention_dropout": 0.1})
    assert settle(model, packing=packing) == Attention("sdpa", is_flat=False)
    assert model.config._attn_implementation == "sdpa"


def test_batches_are_padded_when_padding_free_is_off_but_packs_keep_their_borders() -> None:
    assert settle(build(model_config("llama")), padding_free=False) == Attention(_OURS, is_flat=False)
    assert settle(build(model_config("llama")), padding_free=False, packing=True) == _FLAT


def test_packing_is_refused_when_rows_leak_whatever_the_attention() -> None:
    with pytest.raises(ConfigError, match="lfm2 does not keep the rows of a pack apart"):
        settle(build(model_config("lfm2")), packing=True)


def test_nothing_is_measured_again_when_a_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding grows with the weights: a run must not change its attention because a limit was crossed meanwhile."""
    monkeypatch.setattr("launcher.model.leaks.Shifts.is_same", lambda *args: False)
    assert settle(build(model_config("llama"))) == Attention("sdpa", is_flat=False)
    assert settle(build(model_config("llama")), known=_FLAT.setting()) == _FLAT


def test_trained_model_in_bfloat16_is_the_same_up_to_rounding() -> None:
    """Log probabilities of a model with large weights move by more than 0.1 each where bf16 rounds."""
    model = build(model_config("llama") | {"initializer_range": 0.3}, dtype=torch.bfloat16)
    config = RunConfig()
    config.train.mixed_precision = "bf16"
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), unwrap_model=lambda model: model, autocast=contextlib.nullcontext
    )
    assert settle_attention(config, model, accelerator, 256, "sdpa") == _FLAT


def test_pattern_of_a_mask_is_found_when_it_is_a_window() -> None:
    from transformers import masking_utils as masks

    assert window_of(masks.causal_mask_function) is None
    for window in (1, 2, 16, 4096, 1 << 20):
        assert window_of(masks.sliding_window_causal_mask_function(window)) == window
    assert window_of(masks.sliding_window_causal_mask_function(0)) == 0
    others = [
        masks.bidirectional_mask_function, masks.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long)),
        masks.or_masks(masks.causal_mask_function, masks.sliding_window_bidirectional_overlay(3)),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match="not"):
            window_of(other)


def test_attention_of_transformers_stays_when_a_layer_hands_over_something_unknown() -> None:
    query = torch.zeros(1, 2, 3, 4)
    assert cpu_attention.why_not(torch.nn.Identity(), query, scaling=0.5, new_bias=query) == "new_bias"
    assert cpu_attention.why_not(torch.nn.Identity(), query, new_bias=None, output_attentions=False) is None
