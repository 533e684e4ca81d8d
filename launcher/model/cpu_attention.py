"""Attention on the CPU by plain matrix products, row by row of a pack and block by block of a row.

torch's own CPU kernel masks a pack as one long row, so that its time grows with the square of the pack, and its
backward pass uses no matrix unit of the processor. Here every row is computed alone, and of a row only the blocks below
the diagonal: half of the work of a long row, and a third in a pack of four. Nothing of size T^2 is kept: the backward
pass computes the scores again, as flash attention does (arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "cpu_blocks"
"""As transformers knows it."""
_BLOCK = 128
"""Queries at once: enough for the matrix products, few enough that their scores stay in the cache."""
_HARMLESS = (
    "scaling", "sliding_window", "softcap", "position_ids", "cache_position",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
"""Arguments of an attention that are done here, or change nothing. What else a layer hands over (sinks, biases, masks
of heads, what is not invented yet) would be left out in silence."""


class UnsupportedAttentionError(NotImplementedError):
    """A layer asks for something that this attention does not do."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query_BHTD, key_BKTD, value_BKTD to output_BTHD.

    Args:
        attention_mask: 2D, 1 for tokens; padding on the right. None: every row is full, or `cu_seq_lens_q` says
            where each row of a pack ends.

    Raises:
        UnsupportedAttentionError: see `why_not`.
    """
    if reason := why_not(module, query, dropout=dropout, is_causal=is_causal, **kwargs):
        raise UnsupportedAttentionError(reason)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    borders = kwargs.get("cu_seq_lens_q")
    with torch.autocast("cpu", enabled=False):
        if query.shape[2] == key.shape[2] and (torch.compiler.is_compiling() or _is_right_padded(attention_mask)):
            output: Tensor = _of_rows(query, key, value, attention_mask, borders, scale, softcap, sliding_window)
        else:
            output = _generating(query, key, value, attention_mask, scale, softcap, sliding_window)
    return output, None


def why_not(
    module: nn.Module, query: Tensor, *, dropout: float = 0.0, is_causal: bool | None = None, **kwargs: Any
) -> str | None:
    """What of a call it cannot do."""
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not is_causal:
        return "attention in both directions"
    more = [name for name, value in kwargs.items() if name not in _HARMLESS and not isinstance(value, bool | None)]
    return "dropout" if dropout else more[0] if more else None


def _is_right_padded(mask: Tensor | None) -> bool:
    return mask is None or bool((mask[:, :-1] >= mask[:, 1:]).all())


def _generating(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float | None, window: int | None
) -> Tensor:
    """With keys of a cache before the queries, or padding on the left; output_BTHD."""
    num_queries, num_keys, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)[None]
    is_seen = (distance >= 0) & (distance < (window or num_keys))
    if mask is not None:
        is_seen = is_seen & mask[:, None, None, :].bool()
    scores = scores.masked_fill(~is_seen, torch.finfo(torch.float32).min)  # a row of padding sees something
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


@torch.library.custom_op("launcher::cpu_attention", mutates_args=())
def _of_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, borders: Tensor | None, scale: float,
    cap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """softmax(scale · Q Kᵀ) V, output_BTHD; one operator for the compiler. H query heads share K key heads: the G = H/K
    queries of a head are stacked."""
    rows, key_heads = _rows(query.shape[0], query.shape[2], mask, borders), key.shape[1]
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    by_head = output.transpose(1, 2)
    if sum(end - start for _, start, end in rows) < batch * length:
        output.zero_()  # padding
    for index, first, low, end in _blocks(rows, window):
        stacked = query[index, :, low:end].reshape(key_heads, -1, query.shape[-1])
        probs, _ = _probabilities(stacked, key[index, :, first:end], end - low, scale, cap, window)
        mixed = torch.bmm(probs, value[index, :, first:end])
        by_head[index, :, low:end] = mixed.view(heads, end - low, -1)
    return output


@torch.library.custom_op("launcher::cpu_attention_backward", mutates_args=())
def _of_rows_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, borders: Tensor | None, scale: float,
    cap: float | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, key_heads = _rows(query.shape[0], query.shape[2], mask, borders), key.shape[1]
    grad = grad.transpose(1, 2)
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for index, first, low, end in _blocks(rows, window):
        at, keys = (index, slice(None), slice(low, end)), (index, slice(None), slice(first, end))
        stacked = query[at].reshape(key_heads, -1, query.shape[-1])
        probs, slope = _probabilities(stacked, key[keys], end - low, scale, cap, window)
        out = grad[at].reshape(key_heads, -1, grad.shape[-1])
        grad_value[keys] += torch.bmm(probs.transpose(1, 2), out)
        of_probs = torch.bmm(out, value[keys].transpose(1, 2))
        scores = torch._softmax_backward_data(of_probs, probs, -1, probs.dtype)
        if slope is not None:
            scores = slope.mul_(scores).to(scores.dtype)
        grad_query[at] = _scaled_product(scores, key[keys], scale).view(grad_query[at].shape)
        grad_key[keys] += _scaled_product(scores.transpose(1, 2), stacked, scale)
    return grad_query, grad_key, grad_value


@_of_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


@_of_rows_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, borders, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, mask, borders)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_of_rows_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


_of_rows.register_autograd(_differentiate, setup_context=_keep)


Row = tuple[int, int, int]
"""(index in the batch, first token, token after the last)."""


def _rows(batch: int, length: int, mask: Tensor | None, borders: Tensor | None) -> list[Row]:
    """
    Raises:
        UnsupportedAttentionError: padding on the left, which is for generating only.
    """
    if borders is not None:  # of all rows of the batch, one after another (flash attention's cu_seqlens)
        ends = borders.tolist()
        return [(a // length, a % length, a % length + b - a) for a, b in itertools.pairwise(ends) if b > a]
    if mask is None:
        return [(b, 0, length) for b in range(batch)]
    if not _is_right_padded(mask):
        raise UnsupportedAttentionError("padding on the left")
    ends = mask.sum(-1).tolist()
    return [(b, 0, int(end)) for b, end in enumerate(ends) if end]


def _blocks(rows: list[Row], window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(index in the batch, first key, first query, token after the last query)."""
    for index, start, end in rows:
        size = -(-(end - start) // max(1, round((end - start) / _BLOCK)))
        for low in range(start, end, size):
            yield index, max(start, low - window + 1) if window else start, low, min(end, low + size)


def _probabilities(
    stacked_KMD: Tensor, key_KSD: Tensor, num_queries: int, scale: float, cap: float | None, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """The softmax of the last L queries over S keys, (K, M, S) with M = G · L; with a cap also its derivative, fp32."""
    num_keys = key_KSD.shape[1]
    scores = _scaled_product(stacked_KMD, key_KSD.transpose(1, 2), scale)
    slope = None
    if cap is not None:
        tanh = scores.float().div_(cap).tanh_()
        slope = 1.0 - tanh.square()
        scores = tanh.mul_(cap)
    each = scores.view(-1, num_queries, num_keys)
    offset = num_keys - num_queries  # of the first query among the keys
    if window is not None and window < num_keys:
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=each.device).triu_(offset + 1)
        each.masked_fill_(hidden.logical_or_(torch.ones_like(hidden).tril_(offset - window)), -torch.inf)
    else:
        each[:, :, offset:].clamp_max_(_causal_limits(num_queries, each.dtype))
    return scores.softmax(-1, dtype=torch.float32).to(stacked_KMD.dtype), slope


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a @ b of each head; scaled before it is rounded, which fp16 needs."""
    unused = a.new_empty(1, 1, 1).expand(*a.shape[:2], b.shape[2])
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


@functools.cache
def _causal_limits(size: int, dtype: torch.dtype) -> Tensor:
    """What a score may be at most: -inf above the diagonal, where it may be anything, infinite in fp16."""
    return torch.full((size, size), 2.0, dtype=dtype).tril_().sub_(1.0).mul_(torch.inf)
