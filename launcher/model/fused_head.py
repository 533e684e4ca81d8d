"""The head and the cross entropy as one operation, over labelled positions only and in chunks: the logits of a batch,
often its largest tensor, are never there as a whole."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base.targets import Targets
from launcher.model.cpu_products import linear, outer

_CHUNK_POSITIONS = {"cpu": 1024, "cuda": 2048}
_PIECE_LOGITS = {"cpu": 2**22, "cuda": 2**40}
"""Whose softmax is made at once: on the CPU as many as its cache holds (16 MiB in fp32), else those of a chunk."""
_LARGEST = 9.9
"""Logits of up to sinh(9.9) = 10,000 are looked at, far beyond any cap."""
_TOLERANCE = 1e-6
TARGETS = "fused_head_targets"
"""The keyword of `forward` that asks for the loss instead of logits."""


def chunk_positions(kind: str) -> int:
    """Labelled positions whose logits are there at once on a kind of device."""
    return _CHUNK_POSITIONS.get(kind, 2048)


@contextlib.contextmanager
def chunks_of(kind: str) -> Iterator[None]:
    """On the CPU, chunks as large as on this kind of device: for a plan of what is needed there."""
    sizes = (_CHUNK_POSITIONS, _PIECE_LOGITS)
    before = [size["cpu"] for size in sizes]
    for size in sizes:
        size["cpu"] = size[kind]
    try:
        yield
    finally:
        for size, value in zip(sizes, before, strict=True):
            size["cpu"] = value


@dataclass(frozen=True)
class AfterHead:
    """What a model makes of its head's output: z = cap · tanh(scale · y / cap), or scale · y without a cap.

    Gemma has a cap, Cohere and Granite a scale.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward_(self, grad: Tensor, after: Tensor | None) -> Tensor:
        """From the gradient of what `apply_` gave to that of its input.

        Args:
            after: what `apply_` gave; only needed with a cap. It is overwritten.
        """
        if self.cap is not None:
            assert after is not None
            grad.mul_(after.div_(self.cap).square_().neg_().add_(1.0))
        return grad.mul_(self.scale) if self.scale != 1.0 else grad

    @classmethod
    def seen(cls, before: Tensor, after: Tensor) -> AfterHead | None:
        """What turns `before` (as `_probe` makes it) into `after`; None where it is something else."""
        scale = float(after[1, -1] / before[1, -1])
        largest = float(after.max())
        cap = largest if largest < 0.999 * scale * float(before.max()) else None
        if abs(scale - 1.0) < _TOLERANCE:
            scale = 1.0
        found = cls(scale, cap)
        is_same = torch.allclose(found.apply_(before.clone()), after, rtol=10 * _TOLERANCE, atol=_TOLERANCE)
        return found if is_same else None


def _probe(vocab_size: int, device: torch.device) -> Tensor:
    """Two rows of logits: from -10,000 to 10,000, dense near 0; and small ones, of which a cap leaves the scale."""
    spread = torch.linspace(-_LARGEST, _LARGEST, vocab_size, device=device).sinh()
    return torch.stack([spread, torch.linspace(-1e-3, 1e-3, vocab_size, device=device)])


class _Stand(nn.Module):
    """Stands where the head stands: keeps what the head is given, and gives what it was told to."""

    def __init__(self, head: Any, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        plain = getattr(head, "original_module", head)  # peft would put trained rows into a copy of the weight
        object.__setattr__(self, "weight", getattr(plain, "weight", None))  # Mamba asks for its dtype
        self._answer = answer
        self.given: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.given.append(hidden)
        return self._answer(hidden)


def maybe_fuse_head(
    model: Any, device: torch.device, known: AfterHead | None = None, *, is_compiled: bool = False
) -> bool:
    """Teaches a causal model's `forward` to give the loss itself, where that is exact: the model is tried.

    A stand-in for the head shows what the forward pass does with logits. Where that is neither nothing, nor a scale,
    nor a soft cap, or where the head is not called exactly once on every position, the model stays as it is.
    After this, `model(**inputs, fused_head_targets=Targets(…))` returns {"loss": summed cross entropy in fp32,
    "aux_loss": the router loss or None}; without that keyword nothing changes. Every process must call it.

    Args:
        model: prepared and unwrapped; under peft its base model.
        known: what it does with logits, for a model without memory, which cannot be tried.
        is_compiled: softmax, loss and their gradient become two passes over the logits instead of six.
    """
    head = model.get_output_embeddings()
    where = next(
        ((module, name) for module in model.modules() for name, child in module.named_children() if child is head), None
    )
    if head is None or where is None:
        return False
    after = known or _try(model, where, device)
    if after is None:
        return False
    is_linear = type(head).forward is nn.Linear.forward
    if is_linear:
        _teach_linear(head, after, is_compiled=is_compiled)
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        targets: Targets | None = kwargs.pop(TARGETS, None)
        if targets is None:
            return whole(*args, **kwargs)
        stand = _Stand(head, lambda hidden: hidden.new_empty((hidden.shape[0], 0, 1)))
        outputs = _with_stand(where, stand, lambda: whole(*args, **kwargs))
        (hidden,) = stand.given
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        if is_linear:
            loss = head(chosen, targets.tokens)
        else:  # LoRA on the head: one call, since processes under ZeRO-3 must make the same number of calls
            logits = after.apply_(head(chosen).float().clone())
            loss = nn.functional.cross_entropy(logits, targets.tokens, reduction="sum")
        return {"loss": loss, "aux_loss": getattr(outputs, "aux_loss", None)}

    model.forward = forward
    return True


def _with_stand(where: tuple[nn.Module, str], stand: nn.Module, action: Callable[[], Any]) -> Any:
    owner, name = where
    head = owner._modules[name]
    owner._modules[name] = stand
    try:
        return action()
    finally:
        owner._modules[name] = head


def _try(model: Any, where: tuple[nn.Module, str], device: torch.device) -> AfterHead | None:
    vocab_size = model.config.get_text_config().vocab_size
    probe = _probe(vocab_size, device)
    stand = _Stand(where[0]._modules[where[1]], lambda hidden: probe.unsqueeze(0).clone())
    ids = torch.zeros((1, len(probe)), dtype=torch.long, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = _with_stand(where, stand, lambda: model(input_ids=ids, use_cache=False))
        logits = outputs.logits
        if len(stand.given) != 1 or stand.given[0].shape[:2] != ids.shape or logits.shape != (1, *probe.shape):
            return None
        return AfterHead.seen(probe, logits[0].float())
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError):
        return None  # a forward of another kind, whose whole logits work all the same
    finally:
        model.train(was_training)


def _teach_linear(head: nn.Linear, after: AfterHead, *, is_compiled: bool) -> None:
    """`head(hidden_NH, targets_N)` gives the summed loss. It stays a call of the module, whose hooks gather the weight
    under ZeRO-3."""
    plain, entropy = head.forward, _compiled_cross_entropy() if is_compiled else _cross_entropy

    def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return plain(hidden)
        loss: Tensor = _FusedHead.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, after, torch.is_grad_enabled(), entropy
        )
        return loss

    head.forward = forward  # type: ignore[method-assign, assignment]


def _cross_entropy(
    given: Tensor, bias: Tensor | None, targets: Tensor, after: AfterHead, loss_dtype: torch.dtype, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of logits_NV, in whose place their gradient is written, and that of the bias in fp32."""
    logits = given.float()
    if bias is not None:
        logits += bias
    after.apply_(logits)
    log_probs = logits.log_softmax(-1)
    loss = -log_probs.gather(1, targets[:, None]).sum(dtype=loss_dtype)
    if not needs_grad:
        return loss, None
    grad = log_probs.exp_()
    grad[torch.arange(len(targets), device=grad.device), targets] -= 1.0
    grad = after.backward_(grad, logits if after.cap is not None else None)
    given.copy_(grad)
    return loss, None if bias is None else grad.sum(0)


def _in_two_passes(
    given: Tensor, bias: Tensor | None, targets: Tensor, own: Tensor, after: AfterHead, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for the compiler: the loss of each row, without an indexed read or write, which would be a pass more.

    Args:
        own: what the head and `after` make of each row's target.
    """
    logits = given.float()
    if bias is not None:
        logits = logits + bias
    after.apply_(logits)
    total = logits.logsumexp(-1, keepdim=True)
    if not needs_grad:
        return total - own, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    grad = after.backward_((logits - total).exp() - is_target.float(), logits if after.cap is not None else None)
    given.copy_(grad)
    return total - own, None if bias is None else grad.sum(0)


@functools.cache
def _compiled_cross_entropy() -> Callable[..., tuple[Tensor, Tensor | None]]:
    passes = torch.compile(_in_two_passes, dynamic=True)

    def cross_entropy(
        given: Tensor, bias: Tensor | None, targets: Tensor, after: AfterHead, loss_dtype: torch.dtype, *,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        # Read out here: torch 2.11's compiler read it after the gradient had been written in its place (on a CPU).
        own = given.gather(1, targets[:, None]).float()
        own = after.apply_(own if bias is None else own + bias[targets[:, None]])
        losses, of_bias = passes(given, bias, targets, own, after, needs_grad=needs_grad)
        return losses.sum(dtype=loss_dtype), of_bias

    return cross_entropy


class _FusedHead(torch.autograd.Function):
    """Summed cross entropy of `hidden_NH @ weight_VH.T + bias_V`. Gradients are made in the forward pass, while a
    chunk's logits are there, as Liger does (arXiv 2410.10989): three matrix products, none of them twice.

    Logits have the dtype that forward has; softmax, loss and the sum of the weight's gradients over chunks are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, after: AfterHead, needs: bool,
        entropy: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> Tensor:  # fmt: skip
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        size, num_rows = chunk_positions(kind), max(1, _PIECE_LOGITS.get(kind, 2**40) // len(weight))
        loss = torch.zeros((), dtype=torch.float64 if kind != "mps" else torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs and hidden.requires_grad else None
        needs_weight, needs_bias = needs and weight.requires_grad, needs and bias is not None and bias.requires_grad
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if needs_bias else None
        with torch.autocast(kind, enabled=False):
            used = _cast(weight, dtype)
            for start in range(0, len(targets), size):
                part, chosen = hidden[start : start + size].to(dtype), targets[start : start + size]
                needs_grad = grad_hidden is not None or needs_weight or needs_bias
                grad = linear(part, used)  # logits first
                for low in range(0, len(grad), num_rows):
                    piece = slice(low, low + num_rows)
                    found, of_bias = entropy(grad[piece], bias, chosen[piece], after, loss.dtype, needs_grad=needs_grad)
                    loss += found
                    if grad_bias is not None and of_bias is not None:
                        grad_bias += of_bias
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = linear(grad, used.t())
                if needs_weight:
                    grad_weight = _added(grad_weight, grad, part)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale, (weight_dtype, bias_dtype) = grads[0], ctx.dtypes
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(scale).to(bias_dtype),
            None, None, None, None,
        )  # fmt: skip


_kept: dict[int, Tensor] | None = None


@contextlib.contextmanager
def head_cast_kept() -> Iterator[None]:
    """While no weight changes: the head is cast once, not for every micro-batch."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if _kept is None or weight.dtype == dtype:
        return weight.to(dtype)
    if id(weight) not in _kept:
        _kept[id(weight)] = weight.to(dtype)
    return _kept[id(weight)]


def _added(total: Tensor | None, grad_NV: Tensor, hidden_NH: Tensor) -> Tensor:
    """The weight's gradient with one more chunk, in fp32."""
    if total is None:
        return outer(grad_NV, hidden_NH).float()
    if grad_NV.dtype == torch.float32:
        return total.addmm_(grad_NV.t(), hidden_NH)
    return total.add_(torch.mm(grad_NV.t(), hidden_NH))
