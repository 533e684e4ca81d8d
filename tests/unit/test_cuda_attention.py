"""What of the attention for CUDA can be seen on a CPU: rows of a batch, by torch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from launcher.model import cuda_attention

_LENGTH = 12


class _Groups(TorchFunctionMode):
    """Notes whether torch's attention was given groups of heads, and whether with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            assert kwargs["enable_gqa"] or args[0].shape[1] == args[1].shape[1]
            self.found.append((kwargs["enable_gqa"], kwargs["attn_mask"] is not None))
        return func(*args, **kwargs)


def _exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    group, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    steps = torch.arange(_LENGTH - num_queries, _LENGTH)
    distance = steps[:, None] - torch.arange(_LENGTH)[None]
    allowed = ((distance >= 0) & (distance < (window or _LENGTH)))[None, None]
    if mask is not None:
        allowed = (allowed & mask[:, None, None].bool()) | (distance == 0)[None, None]
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("num_queries", "is_padded", "window", "value_width"), [
    (_LENGTH, False, None, 8), (_LENGTH, True, None, 8), (_LENGTH, False, 3, 8), (1, True, None, 8),
    (_LENGTH, False, None, 4), (_LENGTH, True, 5, 4),
])  # fmt: skip
def test_rows_are_exact_and_no_mask_comes_with_groups_of_heads(
    heads: int, kv_heads: int, num_queries: int, is_padded: bool, window: int | None, value_width: int
) -> None:
    torch.manual_seed(0)
    shapes = [(2, heads, num_queries, 8), (2, kv_heads, _LENGTH, 8), (2, kv_heads, _LENGTH, value_width)]
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask = torch.ones(2, _LENGTH, dtype=torch.long) if is_padded else None
    if mask is not None:
        mask[1, :5] = 0
    with _Groups() as groups:
        found = cuda_attention._by_sdpa(query, key, value, mask, None, window)
    ((is_grouped, has_mask),) = groups.found
    assert is_grouped is (heads > kv_heads and not has_mask and value_width == 8)
    torch.testing.assert_close(found, _exact(query, key, value, mask, window))
