"""Attention on CUDA by the flash kernel that torch itself brings, with the borders of packed rows.

torch's `scaled_dot_product_attention` knows no borders: with a pack it takes a mask as large as the square of the pack,
and a slow kernel. The kernel underneath it knows them (`aten::_flash_attention_forward`, flash attention 2, arXiv
2307.08691), so that no other package is needed for packs to be as fast as their rows. Under
`torch.use_deterministic_algorithms` its backward pass is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from launcher.model import cpu_attention
from launcher.model.cpu_attention import UnsupportedAttentionError

NAME = "cuda_rows"
"""As transformers knows it."""
_MAX_HEAD_DIM = 256
_HALF = (torch.bfloat16, torch.float16)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query_BHTD, key_BKTD, value_BKTD to output_BTHD.

    Args:
        attention_mask: 2D, 1 for tokens. None: every row is full, or `cu_seq_lens_q` says where each row of a pack
            ends (B = 1 then).

    Raises:
        UnsupportedAttentionError: see `why_not`.
    """
    if reason := why_not(module, query, dropout=dropout, softcap=softcap, is_causal=is_causal, **kwargs):
        raise UnsupportedAttentionError(reason)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        return _by_sdpa(query, key, value, attention_mask, scaling, sliding_window), None
    width, value_width = query.shape[-1], value.shape[-1]
    if value_width != width:
        value = nn.functional.pad(value, (0, width - value_width))
    rows, longest = query.shape[0], kwargs["max_length_q"]
    output = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)), borders, borders, longest, longest,
        0.0, True, False, scale=scaling, window_size_left=None if sliding_window is None else sliding_window - 1,
        window_size_right=None if sliding_window is None else 0,
    )[0]  # fmt: skip
    return output[..., :value_width].unflatten(0, (rows, -1)), None


def why_not(
    module: nn.Module, query: Tensor, *, dropout: float = 0.0, softcap: float | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> str | None:  # fmt: skip
    """What of a call it cannot do: no more than ours on the CPU, and less."""
    if reason := cpu_attention.why_not(module, query, dropout=dropout, is_causal=is_causal, **kwargs):
        return reason
    if softcap is not None:
        return "a soft cap"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if dtype not in _HALF or query.shape[-1] > _MAX_HEAD_DIM or query.shape[-1] % 8:
        return f"{dtype}, heads of {query.shape[-1]}"
    return None


def _by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, window: int | None
) -> Tensor:
    """Rows of a batch, padded or with keys of a cache before the queries."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    allowed = None
    if num_queries != num_keys or window is not None or mask is not None:
        steps = torch.arange(num_keys - num_queries, num_keys, device=query.device)
        distance = steps[:, None] - torch.arange(num_keys, device=query.device)[None]
        allowed = ((distance >= 0) & (distance < (window or num_keys)))[None, None]
        if mask is not None:  # a padded query sees itself: a row without any key would be NaN
            allowed = (allowed & mask[:, None, None, :num_keys].bool()) | (distance == 0)[None, None]
    group = query.shape[1] // key.shape[1]
    # As transformers' use_gqa_in_sdpa: with a mask, or values of another width, torch's fast kernels know no groups,
    # and the slow one that is left holds the square of the row's length.
    has_groups = group > 1 and allowed is None and key.shape[-1] == value.shape[-1]
    if group > 1 and not has_groups:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scaling, enable_gqa=has_groups
    )
    return output.transpose(1, 2)
