"""Promise 7 on CUDA: a pack teaches what its rows teach alone, with every attention that is there."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from launcher.model import attention, cuda_attention
from launcher.model.packing_check import borders_of

_LENGTHS = (37, 5, 64, 1, 21)


def _model(implementation: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    return model.to("cuda", dtype)


def _loss(model: Any, rows: list[torch.Tensor], is_packed: bool) -> tuple[float, torch.Tensor]:
    """Summed loss and the gradient of the first layer's query projection."""
    model.zero_grad()
    batches = [rows] if is_packed else [[row] for row in rows]
    has_borders = model.config._attn_implementation == cuda_attention.NAME
    total = 0.0
    for batch in batches:
        ids = torch.cat(batch)[None]
        positions = torch.cat([torch.arange(len(row), device="cuda") for row in batch])[None]
        borders = borders_of([len(row) for row in batch], ids.device) if has_borders else {}
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **borders).logits[0, :-1].float()
        targets, starts = ids[0, 1:].clone(), positions[0, 1:] == 0
        targets[starts] = -100
        if bool((targets != -100).any()):
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            loss.backward()
            total += float(loss.detach())
    return total, model.model.layers[0].self_attn.q_proj.weight.grad.float()


_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_THERE = [
    "sdpa",
    cuda_attention.NAME,
    "flex_attention",
    *(n for n, p in _PACKAGES.items() if importlib.util.find_spec(p)),
]
"""Of the implementations that train in bf16, those that are installed."""


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("eager", torch.float32, 1e-4), ("sdpa", torch.float32, 1e-4), *((name, torch.bfloat16, 2e-2) for name in _THERE)],
)
def test_a_pack_teaches_what_its_rows_teach_alone(implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    """Alone, they are seen by torch's own attention."""
    if implementation == cuda_attention.NAME:
        attention._register(implementation, cuda_attention.attend)
    torch.manual_seed(1)
    rows = [torch.randint(0, 512, (length,), device="cuda") for length in _LENGTHS]
    model = _model(implementation, dtype)
    packed, packed_grad = _loss(model, rows, is_packed=True)
    model.set_attn_implementation("sdpa")
    apart, apart_grad = _loss(model, rows, is_packed=False)
    assert abs(packed / apart - 1) < tolerance / 10
    assert float((packed_grad - apart_grad).norm() / apart_grad.norm()) < tolerance


_SHAPES = [(4, 4, 64, None), (8, 2, 128, None), (4, 1, 80, None), (4, 2, 64, 16), (2, 2, 256, None)]
"""Heads, heads of keys, their width, window."""


@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), _SHAPES)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_rows_of_a_pack_are_what_they_are_alone_in_float64(
    heads: int, kv_heads: int, width: int, window: int | None, is_deterministic: bool
) -> None:
    """Outputs and gradients against plain attention in float64, each row for itself."""
    torch.manual_seed(2)
    total = sum(_LENGTHS)
    shapes = [(1, heads, total, width), (1, kv_heads, total, width), (1, kv_heads, total, width)]
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    borders = torch.tensor([0, *torch.tensor(_LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    target = torch.randn(1, total, heads, width, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        output, _ = cuda_attention.attend(
            torch.nn.Module(), *given, None, sliding_window=window, is_causal=True, cu_seq_lens_q=borders,
            max_length_q=max(_LENGTHS),
        )  # fmt: skip
        output.backward(target)
        grads = [x.grad.clone() for x in given if x.grad is not None]
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [x.detach().double().requires_grad_() for x in given]
    q, k, v = exact[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])
    start, parts = 0, []
    for length in _LENGTHS:
        part = slice(start, start + length)
        distance = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")[None]
        scores = q[:, :, part] @ k[:, :, part].transpose(2, 3) / width**0.5
        hidden = (distance < 0) | (distance >= (window or total))
        parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, part])
        start += length
    expected = torch.cat(parts, 2).transpose(1, 2)
    expected.backward(target.double())
    for found, wanted in zip([output.detach(), *grads], [expected.detach(), *(x.grad for x in exact)], strict=True):
        assert wanted is not None
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2


def test_padded_rows_and_caches_are_as_sdpa_has_them() -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 4, 12, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(2, 12, device="cuda", dtype=torch.long)
    mask[1, :5] = 0  # padding on the left, as in a generation
    for queries in (query, query[:, :, -1:]):
        output, _ = cuda_attention.attend(torch.nn.Module(), queries, key, value, mask, is_causal=True)
        steps = torch.arange(12 - queries.shape[2], 12, device="cuda")
        allowed = (steps[:, None] >= torch.arange(12, device="cuda")[None])[None, None] & mask[:, None, None].bool()
        wanted = torch.nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=allowed)
        rows = mask[:, steps].bool()
        assert torch.allclose(output[rows].float(), wanted.transpose(1, 2)[rows].float(), atol=2e-2)
