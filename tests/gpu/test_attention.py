"""Promise 7 on CUDA: a pack teaches what its rows teach alone, with every attention that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    total = 0.0
    for batch in batches:
        ids = torch.cat(batch)[None]
        positions = torch.cat([torch.arange(len(row), device="cuda") for row in batch])[None]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1].float()
        targets, starts = ids[0, 1:].clone(), positions[0, 1:] == 0
        targets[starts] = -100
        if bool((targets != -100).any()):
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            loss.backward()
            total += float(loss)
    return total, model.model.layers[0].self_attn.q_proj.weight.grad.float()


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("eager", torch.float32, 1e-4), ("sdpa", torch.float32, 1e-4), ("sdpa", torch.bfloat16, 2e-2)],
)
def test_a_pack_teaches_what_its_rows_teach_alone(implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    rows = [torch.randint(0, 512, (length,), device="cuda") for length in _LENGTHS]
    model = _model(implementation, dtype)
    packed, packed_grad = _loss(model, rows, is_packed=True)
    apart, apart_grad = _loss(model, rows, is_packed=False)
    assert abs(packed / apart - 1) < tolerance / 10
    assert float((packed_grad - apart_grad).norm() / apart_grad.norm()) < tolerance
