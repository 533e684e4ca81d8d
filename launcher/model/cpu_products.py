"""fp32 matrix products on the CPU by oneDNN, where torch's own use half of the processor.

torch gives them to MKL, which chooses its kernels by the maker of the processor: on one that is not Intel's it leaves
the 512-bit half out (Zen 5, two cores: 210 against 450 GFLOP/s). oneDNN, which torch brings along, goes by what the
processor says that it can do. The sums have another order, and nothing else differs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SMALLEST = 2**22
"""Multiplications of a product from which on it is faster, measured on one and two cores."""
_FEWEST_ROWS = 4
"""A token that is generated alone is no product of matrices."""
_NARROWEST = 24
"""Features; the backward pass of thinner layers (LoRA's rank) can take twice as long."""


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


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """torch.mm."""
    return _linear(a_MK, b_KN.t()) if _is_ours(a_MK, b_KN.t()) else torch.mm(a_MK, b_KN)


def batched_product(a_BMK: Tensor, b_BKN: Tensor, scale: float = 1.0) -> Tensor:
    """scale · torch.bmm, for a few large products."""
    if _is_ours(a_BMK[0], b_BKN[0].t()):
        a_BMK = a_BMK if scale == 1.0 else a_BMK * scale
        return torch.stack([_linear(a, b.t()) for a, b in zip(a_BMK, b_BKN, strict=True)])
    unused = a_BMK.new_empty(1, 1, 1).expand(len(a_BMK), a_BMK.shape[1], b_BKN.shape[2])
    return torch.baddbmm(unused, a_BMK, b_BKN, beta=0, alpha=scale)


def use_fast_products(model: nn.Module, device: torch.device) -> None:
    """Lets the linear layers of a model multiply this way, where it is faster."""
    if device.type != "cpu" or not is_faster():
        return
    for module in model.modules():
        is_plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
        if is_plain and isinstance(module, nn.Linear):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, given: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if not _is_ours(given, weight) or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(given, weight, bias)
    output: Tensor = _Linear.apply(given, weight, bias)  # type: ignore[no-untyped-call]
    return output


def _is_ours(given: Tensor, weight: Tensor) -> bool:
    if given.dtype != torch.float32 or weight.dtype != torch.float32 or given.device.type != "cpu" or not is_faster():
        return False
    num_outputs, num_inputs = weight.shape
    is_wide = min(num_inputs, num_outputs) >= _NARROWEST and given.numel() >= _FEWEST_ROWS * num_inputs
    return is_wide and given.numel() * num_outputs >= _SMALLEST and _is_dense(given) and _is_dense(weight)


def _is_dense(given: Tensor) -> bool:
    """oneDNN takes minutes for others (a slice of columns)."""
    return given.is_contiguous() or (given.ndim == 2 and given.t().is_contiguous())


def _linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """given_XI @ weight_OI.T + bias_O, as inductor calls it for a linear layer on the CPU."""
    is_traced = torch.compiler.is_compiling()
    found: Tensor = (
        _for_compiler(given, weight, bias) if is_traced
        else torch.ops.mkldnn._linear_pointwise.default(given, weight, bias, "none", [], "")
    )  # fmt: skip
    return found


@torch.library.custom_op("launcher::cpu_linear", mutates_args=())
def _for_compiler(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Which would change the layout of what it finds inside."""
    return _linear(given, weight, bias)


@_for_compiler.register_fake
def _(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return given.new_empty(*given.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """`_linear`, and the two products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = given.contiguous()
        ctx.save_for_backward(given if weight.requires_grad else None, weight)
        return _linear(given, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.view(-1, grad.shape[-1])
        needs_given, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _linear(grad, weight.t()) if needs_given else None,
            _linear(rows.t(), given.view(-1, given.shape[-1]).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
