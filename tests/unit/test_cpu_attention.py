"""Attention by blocks on the CPU against plain softmax over the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.model.cpu_attention import UnsupportedAttentionError, attend

_HEADS, _KEY_HEADS, _SIZE = 6, 2, 8


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, heads, _SIZE, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS)
    ]


def plain(
    query: Tensor, key: Tensor, value: Tensor, row_of_BT: Tensor, window: int | None = None, cap: float | None = None
) -> Tensor:
    """In fp64. `row_of_BT`: tokens with the same number see each other; -1 is padding."""
    key, value = (x.repeat_interleave(_HEADS // _KEY_HEADS, 1).double() for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * _SIZE**-0.5
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])[None]
    seen = (distance >= 0) & (distance < (window or query.shape[2])) & (row_of_BT[:, :, None] == row_of_BT[:, None])
    output = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value
    return output.transpose(1, 2) * (row_of_BT >= 0)[:, :, None, None]


def compare(found: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights * (expected != 0)  # what stands at padding is nobody's business
    own = torch.autograd.grad((found.double() * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    for mine, right in zip((found * (expected != 0), *own), (expected, *wanted), strict=True):
        assert (mine - right).detach().double().abs().max() <= tolerance * right.detach().abs().max()


@pytest.mark.parametrize("length", [1, 2, 127, 130, 300])
@pytest.mark.parametrize("more", [{}, {"softcap": 0.7}, {"sliding_window": 5}, {"sliding_window": 150, "softcap": 2.0}])
def test_output_and_gradients_are_plain_softmaxs_when_rows_are_full(length: int, more: dict[str, Any]) -> None:
    tensors = inputs(2, length)
    found, _ = attend(nn.Module(), *tensors, None, **more)
    expected = plain(
        *tensors, torch.zeros(2, length, dtype=torch.long), more.get("sliding_window"), more.get("softcap")
    )  # fmt: skip
    compare(found, expected, tensors, 5e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-2)])
def test_rows_of_a_pack_are_kept_apart_when_borders_are_given(dtype: torch.dtype, tolerance: float) -> None:
    lengths = [140, 1, 60, 99]
    tensors = inputs(1, sum(lengths), dtype)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    found, _ = attend(nn.Module(), *tensors, None, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    compare(found, plain(*tensors, rows), tensors, tolerance)


@pytest.mark.parametrize("window", [None, 3])
def test_scores_that_nobody_sees_may_overflow(window: int | None) -> None:
    """In fp16 that is 65,504: query 0 with key 5, which comes after it."""
    tensors = inputs(1, 9, torch.float16)
    with torch.no_grad():
        tensors[0][:, :, 0] = tensors[1][:, :, 5] = 300.0
    output, _ = attend(nn.Module(), *tensors, None, sliding_window=window)
    output.sum().backward()
    assert output.isfinite().all() and all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


def test_gradients_of_fp16_are_scaled_before_they_are_rounded() -> None:
    """Their sums are beyond 65,504, a 256th of them is not."""
    tensors = inputs(1, 200, torch.float16)
    with torch.no_grad():
        tensors[0].mul_(50.0)
        tensors[1].mul_(50.0)
    output, _ = attend(nn.Module(), *tensors, None, scaling=1 / 256)
    output.backward(500.0 * torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).half())
    largest = [float(x.grad.abs().max()) for x in tensors if x.grad is not None]
    assert all(map(math.isfinite, largest)) and 256 * min(largest[:2]) > 65_504


def test_padding_on_the_right_changes_nothing_when_rows_have_different_lengths() -> None:
    tensors, mask = inputs(3, 9), torch.arange(9)[None] < torch.tensor([9, 1, 4])[:, None]
    found, _ = attend(nn.Module(), *tensors, mask)
    compare(found, plain(*tensors, mask.long() - 1), tensors, 5e-6)


def test_cache_and_padding_on_the_left_are_seen_when_generating() -> None:
    query, key, value = (x.detach() for x in inputs(2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    expected = plain(query, key, value, mask - 1)[:, -1:]
    found, _ = attend(nn.Module(), query[:, :, -1:], key, value, mask)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    prefill, _ = attend(nn.Module(), query, key, value, mask)
    assert torch.allclose(prefill[:, -1:].double(), expected, atol=1e-6)


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"is_causal": False}, {"s_aux": torch.zeros(_HEADS)}])
def test_layer_is_refused_when_it_asks_for_more(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAttentionError):
        attend(nn.Module(), *inputs(1, 4), None, **more)
