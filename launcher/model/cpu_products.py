"""fp32 matrix products on the CPU by oneDNN, where torch's own use half of the processor.

torch gives them to MKL, which chooses its kernels by the maker of the processor: on one that is not Intel's it leaves
the 512-bit half out (Zen 5, two cores: 210 against 450 GFLOP/s). oneDNN, which torch brings along, goes by what the
processor says that it can do. The sums have another order, and nothing else differs.

oneDNN makes and keeps code for every shape that it meets, half a megabyte each. So rows are taken in blocks of powers
of two, and what is left over is torch's.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SMALLEST_BLOCK = 256
"""Rows."""
_SMALLEST = 2**22
"""Multiplications of a block from which on it is faster, measured on one and two cores."""
_NARROWEST = 32
"""Features; the backward pass of thinner layers (LoRA's rank) can take twice as long."""
_ALIGNMENT = 64
"""Bytes: where torch's own memory begins."""


@functools.cache
def is_faster() -> bool:
    """Whether this processor has what MKL does not use."""
    can = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not can or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        is_of_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return not is_of_intel and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, without gradients."""
    if not _is_ours_linear(rows_NI, weight_OI, bias_O):
        return nn.functional.linear(rows_NI, weight_OI, bias_O)
    rows = rows_NI.contiguous()
    parts = [_by_onednn(rows[block], weight_OI, bias_O) for block in _blocks(len(rows))]
    num_done = sum(map(len, parts))
    if num_done < len(rows):
        parts.append(nn.functional.linear(rows[num_done:], weight_OI, bias_O))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def outer(a_NM: Tensor, b_NK: Tensor) -> Tensor:
    """a.T @ b, summed over the N rows."""
    if not _is_ours(len(a_NM), a_NM.shape[1], b_NK.shape[1], a_NM, b_NK):
        return torch.mm(a_NM.t(), b_NK)
    a_NM, b_NK, num_done = a_NM.contiguous(), b_NK.contiguous(), 0
    total: Tensor | None = None
    for block in _blocks(len(a_NM)):
        part = _by_onednn(a_NM[block].t(), b_NK[block].t())
        total, num_done = part if total is None else total.add_(part), block.stop
    assert total is not None
    return total.addmm_(a_NM[num_done:].t(), b_NK[num_done:]) if num_done < len(a_NM) else total


def use_fast_products(model: nn.Module, device: torch.device) -> None:
    """Lets the linear layers of a model multiply this way, where it is faster."""
    if device.type != "cpu" or not is_faster():
        return
    for module in model.modules():
        is_plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
        if is_plain and isinstance(module, nn.Linear):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


def align_weights(model: nn.Module, device: torch.device, *, only_trained: bool) -> None:
    """Weights that are used on the CPU begin where torch lets its own begin.

    In a model's file they may begin anywhere, and are used there; after a resume they have memory of their own. torch's
    product of a single row with a weight adds up in another order where that begins at no multiple of 16 bytes.

    Args:
        only_trained: the others are read from the same file at every start. They stay in memory that processes share.
    """
    if device.type != "cpu":
        return
    for tensor in (*model.parameters(), *model.buffers()):
        is_meant = (tensor.requires_grad or not only_trained) and tensor.layout is torch.strided
        if is_meant and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(input, weight, bias)
    # Shapes change out here: what a function of one's own gives must be no view where a model changes it in place.
    if torch.compiler.is_compiling():
        if not _is_wide(*weight.shape) or not _are_fp32(input, weight):
            return nn.functional.linear(input, weight, bias)
        rows: Tensor = _compiled_linear(input.reshape(-1, input.shape[-1]), weight, bias)
    elif _is_ours_linear(input, weight, bias):
        rows = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    else:
        return nn.functional.linear(input, weight, bias)
    return rows.view(*input.shape[:-1], len(weight))


def _is_ours_linear(given_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    if not is_faster() or weight_OI.ndim != 2 or not given_XI.numel() or given_XI.shape[-1] != weight_OI.shape[1]:
        return False
    is_dense = weight_OI.is_contiguous() or weight_OI.t().is_contiguous()  # a slice of columns takes oneDNN minutes
    has_plain_bias = bias_O is None or (bias_O.shape == weight_OI.shape[:1] and bias_O.is_contiguous())
    is_taken = is_dense and has_plain_bias
    return is_taken and _is_ours(given_XI.numel() // given_XI.shape[-1], *weight_OI.shape, given_XI, weight_OI)


def _is_ours(num_rows: int, width: int, other_width: int, *operands: Tensor) -> bool:
    return num_rows >= _SMALLEST_BLOCK and _is_wide(width, other_width) and is_faster() and _are_fp32(*operands)


def _is_wide(width: int, other_width: int) -> bool:
    return min(width, other_width) >= _NARROWEST and _SMALLEST_BLOCK * width * other_width >= _SMALLEST


def _are_fp32(*operands: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in operands)


def _blocks(num_rows: int) -> Iterator[slice]:
    """The largest power of two, again and again."""
    start = 0
    while (left := num_rows - start) >= _SMALLEST_BLOCK:
        size = 1 << (left.bit_length() - 1)
        yield slice(start, start + size)
        start += size


def _by_onednn(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As inductor calls it for a linear layer on the CPU."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows_NI, weight_OI, bias_O, "none", [], "")
    return found


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor | None) -> None:
    rows, weight, _ = inputs
    ctx.save_for_backward(rows if weight.requires_grad else None, weight)


def _gradients(
    ctx: Any, grad: Tensor, linear: Callable[..., Tensor], outer: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    rows, weight = ctx.saved_tensors
    needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        linear(grad, weight.t(), None) if needs_rows else None,
        outer(grad, rows) if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


class _Linear(torch.autograd.Function):
    """`linear`, and the two products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _keep(ctx, (rows, weight, bias), None)
        return linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, linear, outer)


# The same for the compiler, which takes MKL where it sees what is inside: operators that know the number of rows when
# they run. As they cost 20 us more at each call, layers that are not compiled leave them aside.


@torch.library.custom_op("launcher::cpu_linear", mutates_args=())
def _compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(rows, weight, bias)


@torch.library.custom_op("launcher::cpu_outer", mutates_args=())
def _compiled_outer(a: Tensor, b: Tensor) -> Tensor:
    return outer(a, b)


@_compiled_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@_compiled_outer.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, _compiled_linear, _compiled_outer)


_compiled_linear.register_autograd(_differentiate, setup_context=_keep)
