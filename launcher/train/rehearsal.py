"""An optimizer of the user's own is tried on small tensors before the first step, and whether it can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from launcher.base.errors import ConfigError
from launcher.checkpoint import rng
from launcher.checkpoint.group_state import GroupState, is_kept, tensor_kinds
from launcher.checkpoint.load import scalar_of
from launcher.checkpoint.segments import Segment, collect, is_elementwise
from launcher.config.settings import RunConfig
from launcher.model.optim import make_optimizer

_FLAT = (64,)
"""DeepSpeed gives an optimizer flat pieces of its groups."""
_LARGEST = (64, 48, 8, 8, 8)
"""Of a tensor that is tried: enough to see what an optimizer makes of its dimensions."""
_NUM_BEFORE, _NUM_AFTER = 1, 1
"""Updates before the state is carried over as a checkpoint would, and after it. No more: one's own optimizer may mean
to do something at its fifth. So what acts only every few updates is not seen."""


class _Trial:
    """An instance of the optimizer with parameters of its own."""

    def __init__(self, config: RunConfig, tensors: Sequence[Sequence[Tensor]], decays: Sequence[float]) -> None:
        self.params = [[torch.nn.Parameter(tensor.clone()) for tensor in group] for group in tensors]
        groups = [{"params": p, "weight_decay": d} for p, d in zip(self.params, decays, strict=True)]
        self.optimizer = make_optimizer(config, groups)
        self._names = {f"{i}-{j}": p for i, group in enumerate(self.params) for j, p in enumerate(group)}
        self.first_groups = GroupState(self.optimizer)

    def update(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """By a backward pass, since some optimizers hook into it."""
        for group, own in zip(self.params, gradients, strict=True):
            for tensor, gradient in zip(group, own, strict=True):
                (tensor * gradient).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def carry_on(self, other: _Trial) -> None:
        """Takes parameters and state of another one, as a resume would from a checkpoint."""
        pairs = zip(self._segments(), other._segments(), strict=True)
        for mine, theirs in pairs:
            mine.key.copy_(theirs.key)
            mine.state.clear()
            mine.state.update({k: v.clone().view(mine.key.shape) for k, v in theirs.elementwise().items()})
            mine.state.update({k: v.clone() for k, v in theirs.odd().items()})
            kinds = tensor_kinds([theirs])
            for name, value in theirs.scalars().items():
                number = value.item() if isinstance(value, Tensor) else value
                mine.state[name] = scalar_of(mine, number, kinds.get(name))
        self.first_groups.load(other.first_groups.moved())

    def _segments(self) -> tuple[Segment, ...]:
        prepared = SimpleNamespace(optimizer=self.optimizer)  # as Accelerate wraps it
        return collect(torch.nn.ParameterDict(self._names), prepared, rank=0, world_size=1).segments

    def not_kept(self) -> list[str]:
        """The names of what the optimizer keeps where it should, but not as tensors and numbers."""
        found = {
            name for state in self.optimizer.state.values() for name, value in state.items()
            if not isinstance(value, (Tensor, int, float)) or isinstance(value, bool)
        }  # fmt: skip
        found |= {k for g in self.optimizer.param_groups for k, v in g.items() if k != "params" and not is_kept(v)}
        return sorted(map(str, found))


def try_optimizer(config: RunConfig, optimizer: torch.optim.Optimizer, device: torch.device) -> list[str]:
    """A few updates by other instances that get small parameters, so that what fails does so before the first step. Of
    every class but torch's and DeepSpeed's. Collective, as an optimizer may be.

    Args:
        optimizer: as it was built, before DeepSpeed wraps it.

    Returns:
        Notices: that a resume would go on otherwise than a run that nobody stopped, or that ZeRO makes another of it.

    Raises:
        ConfigError: it does what cannot be kept here. Exception: whatever it raises itself.
    """
    if type(optimizer).__module__.partition(".")[0] in ("torch", "deepspeed"):
        return []
    name = f"optim.name={config.optim.name}"
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError([
            f"{name} has a mode to train in and one to evaluate in (it is schedule-free): other weights would have to "
            "be evaluated and saved than are trained, which is not done here. Take an optimizer without, such as "
            "optim.name=AdamW, with scheduler=constant_with_warmup where it is for the schedule"
        ])  # fmt: skip
    groups = [(_shapes(config, group["params"]), group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    if config.strategy.is_offloaded:
        device = torch.device("cpu")
    source = torch.Generator().manual_seed(config.seed)

    def drawn(size: float) -> list[list[Tensor]]:
        return [[(torch.randn(s, generator=source) * size).to(device) for s in shapes] for shapes, _ in groups]

    weights, decays = drawn(0.02), [decay for _, decay in groups]
    trial = _Trial(config, weights, decays)
    if config.strategy.zero_stage:
        _check_groups_can_be_set(name, trial.optimizer)
    for _ in range(_NUM_BEFORE):
        trial.update(drawn(1e-3))
    resumed = _Trial(config, weights, decays)
    resumed.carry_on(trial)
    before = [[p.detach().clone() for p in group] for group in trial.params]
    gradients, streams = [drawn(1e-3) for _ in range(_NUM_AFTER)], rng.capture()
    for made in (trial, resumed):
        rng.restore(streams)
        for gradient in gradients:
            made.update(gradient)
    _check_finite(name, trial)
    notices = _compared(name, before, trial, resumed)
    if config.strategy.zero_stage and not is_elementwise(trial.optimizer):
        notices.append(
            f"WARNING {name} treats a matrix otherwise than flat pieces of it, and flat pieces are what it gets under "
            f"strategy={config.strategy.name}. For what it does to matrices: strategy=ddp or strategy=single"
        )
    return notices


def _shapes(config: RunConfig, parameters: Sequence[Tensor]) -> list[torch.Size]:
    """One of each number of dimensions, or a flat piece."""
    if config.strategy.zero_stage:
        return [torch.Size(_FLAT)]
    found: dict[int, torch.Size] = {}
    for parameter in sorted(parameters, key=torch.numel):
        found.setdefault(parameter.dim(), torch.Size(map(min, parameter.shape, _LARGEST)))
    return list(found.values())


def _check_groups_can_be_set(name: str, optimizer: Any) -> None:
    try:
        optimizer.param_groups = list(optimizer.param_groups)
    except AttributeError as error:
        raise ConfigError([
            f"{name}: its param_groups cannot be set, which DeepSpeed does. Make it an attribute, or take "
            "strategy=ddp or strategy=single"
        ]) from error  # fmt: skip


def _check_finite(name: str, trial: _Trial) -> None:
    if not all(bool(p.isfinite().all()) for group in trial.params for p in group):
        raise ConfigError([
            f"{name} made NaN or infinite parameters of a few small ones in {_NUM_BEFORE + _NUM_AFTER} updates, with "
            "gradients of about 0.001. See optim.learning_rate and optim.kwargs"
        ])  # fmt: skip


@torch.no_grad()
def _compared(name: str, before: Sequence[Sequence[Tensor]], trial: _Trial, resumed: _Trial) -> list[str]:
    """Whether the one that was carried over went elsewhere, by more than sums in another order explain."""
    for group in zip(before, trial.params, resumed.params, strict=True):
        for start, there, here in zip(*group, strict=True):
            if float((there - here).norm()) > 1e-3 * float((there - start).norm()):
                odd = trial.not_kept()
                where = f"among it {', '.join(odd)} in its state or groups" if odd else "such as attributes of its own"
                return [
                    f"WARNING {name} keeps what no checkpoint holds ({where}): a run that is resumed goes on otherwise "
                    "than one that nobody stopped. Tensors and numbers in optimizer.state[parameter], and numbers in "
                    "its param_groups, are saved and resumed"
                ]
    return []
