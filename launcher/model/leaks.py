"""Whether predictions are what they must be: measured on the model itself, told apart from rounding.

What rounding does is measured as well: by changes that cannot matter. No fixed limit fits untrained and trained models,
fp32, TF32 and bf16, and mixtures of experts.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NUM_DRAWS = 4
_MAX_LEAK = 1e-5
"""In log probabilities. Seen in fp32: 0 where rows are apart, 4e-5 and more where they are not (untrained). In bf16 on
a CPU: 0 in all of 27 architectures, mixtures among them, 1e-3 and more where they are not (LFM2, bloom; untrained)."""

_LEAST = -1e4
"""Log probabilities below it are as good as minus infinity, of which differences are no numbers."""
_NUM_ROUNDINGS = 4
"""How many times what rounding once more changes. Seen between two kernels of attention: at most 0.7 in bf16 (SmolLM2
trained and untrained, 31 small architectures), 1.6 in fp32, where a log probability is of few units of the last place;
30 and more where positions are others."""


class Leaks:
    """How much predictions change by what they must not depend on, beside what rounding alone changes.

    How many tokens an expert of a mixture gets decides how its products are computed and rounded, in bf16 on CUDA by
    more than some leaks. So the same change is also made where nothing can leak: a leak is more than twice the largest
    of those, at the same position in every draw. Where there is no leak both are the same rounding, and four draws in
    a row beyond twice of what eleven positions of four others show are out of the question.
    """

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._control: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """Log probabilities (positions, vocabulary) of one draw before and after the change."""
        self._found.append(_by_position(before, after))

    def add_control(self, before: Tensor, after: Tensor) -> None:
        """Those that the change cannot reach."""
        self._control.append(_by_position(before, after))

    @property
    def smallest(self) -> float:
        """Of all draws, at the position where it is largest."""
        return float(torch.stack(self._found).amin(0).max())

    @property
    def are_none(self) -> bool:
        return all(bool(each.max() <= _MAX_LEAK) for each in self._found)

    @property
    def are_unknown(self) -> bool:
        """The model predicts nothing: its weights are not finite."""
        return math.isnan(self.smallest)

    @property
    def are_rounding(self) -> bool:
        noise = max((float(each.max()) for each in self._control), default=0.0)
        return self.smallest <= max(_MAX_LEAK, 2 * noise)


class Shifts:
    """How far predictions are from those that they must equal, beside what rounding alone changes.

    Another kernel adds up in another order, and so rounds each of its results otherwise; how much of that arrives at
    the predictions depends on the model (trained, of 30 layers in bf16: 0.2 in log probability; untrained, of two:
    0.001), and a processor may show none of it between batches of other shapes (AMX).
    """

    def __init__(self) -> None:
        self._noise = 0.0
        self.smallest = float("inf")
        """The largest difference of a log probability, in the draw where it is smallest."""

    def add_control(self, found: Tensor, again: Tensor) -> None:
        """Log probabilities of the same rows as transformers has them: in batches of other shapes, or rounded once
        more (`rounded_once_more`)."""
        self._noise = max(self._noise, _rms(found - again))

    def is_same(self, found: Tensor, expected: Tensor) -> bool:
        """Whether they are equal up to rounding."""
        self.smallest = min(self.smallest, float((found - expected).abs().max()))
        return _rms(found - expected) <= _NUM_ROUNDINGS * self._noise


@contextlib.contextmanager
def rounded_once_more(model: Any) -> Iterator[None]:
    """What each layer gives moves inside by up to half a unit of the last place, at random, as rounding moves it."""
    generators: dict[torch.device, torch.Generator] = {}

    def moved(layer: Any, given: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(0))
        # In place: the logits of a long pack may be the largest tensor that fits.
        factors = torch.rand(output.shape, generator=generator, device=output.device).sub_(0.5)
        factors.mul_(torch.finfo(output.dtype).eps).add_(1.0)
        return factors.mul_(output).to(output.dtype)

    layers = [layer for layer in model.modules() if next(layer.children(), None) is None]
    hooks = [layer.register_forward_hook(moved) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _by_position(before: Tensor, after: Tensor) -> Tensor:
    return (before - after).abs().amax(-1).cpu()


def all_agree(found: bool, device: torch.device) -> bool:
    """Whether it is so on every process: what they measure may differ, what they do next must not. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    answer = torch.tensor(int(found), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer.item())


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def random_rows(draw: int, lengths: Sequence[int], vocab_size: int, device: torch.device) -> list[Tensor]:
    """Token ids, the same on every process."""
    generator = torch.Generator().manual_seed(draw)
    return [torch.randint(0, vocab_size, (length,), generator=generator).to(device) for length in lengths]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """A micro-batch as transformers takes it: padded on the right, no positions."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long(),
    }


def log_probs(model: Any, inputs: Mapping[str, Any], positions: Sequence[int] | None = None) -> Tensor:
    """Of a micro-batch, in fp32: in bf16 a step of a log probability is as large as some leaks.

    Args:
        positions: those that are wanted; None: all. The logits of others are not made where the model takes that.
    """
    if positions is None:
        logits: Tensor = model(**inputs, use_cache=False).logits
    else:
        chosen = torch.tensor(positions, device=inputs["input_ids"].device)
        if _takes_positions(model):
            logits = model(**inputs, use_cache=False, logits_to_keep=chosen).logits
        else:
            logits = model(**inputs, use_cache=False).logits.index_select(1, chosen)
    return logits.float().log_softmax(-1).clamp_(min=_LEAST)


def _takes_positions(model: Any) -> bool:
    """Whether the model that others wrap makes only the logits that are asked for."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
