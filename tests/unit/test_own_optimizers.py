"""Optimizers as people write them: tried before the first step, and whether a checkpoint holds what they keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from launcher.base.errors import ConfigError
from launcher.checkpoint.group_state import GroupState
from launcher.checkpoint.segments import is_elementwise
from launcher.config.settings import RunConfig
from launcher.model.optim import build_optimizer
from launcher.train.rehearsal import try_optimizer

_HERE = "tests.unit.test_own_optimizers"


class Own(Optimizer):
    """Plain descent; what `apply` does with a parameter is each one's own."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **more: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.apply(p, group)

    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] * group.get("d", 1.0))


class Prodigy(Own):
    """As prodigyopt and D-Adaptation: what they estimate is in the groups."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay, d=1.0)

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["d"] *= 1.5


class TensorProdigy(Own):
    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay, scale=torch.tensor(1.0))

    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad * group["lr"] * group["scale"])

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["scale"] = group["scale"] * 1.5


class Muon(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        update = p.grad / p.grad.norm()
        p.sub_(1.5 * update - 0.5 * update @ update.T @ update if p.ndim == 2 else p.grad, alpha=group["lr"])


class Regrouped(Own):
    """As Muon: matrices in one group, the rest in another, and no weight_decay in either."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        every = [p for group in params for p in group["params"]]
        groups = [{"params": [p for p in every if (p.ndim > 1) == is_matrix]} for is_matrix in (True, False)]
        Optimizer.__init__(self, [g for g in groups if g["params"]], {"lr": lr})


class Normed(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        ratio = float(p.norm() / p.grad.norm())  # type: ignore[union-attr]
        assert math.isfinite(ratio) and ratio > 0
        if p.ndim > 1:
            gram = p.grad @ p.grad.T if p.shape[0] <= p.shape[1] else p.grad.T @ p.grad  # type: ignore[union-attr]
            torch.linalg.cholesky(gram + 1e-12 * torch.eye(len(gram)))
        super().apply(p, group)


class Hooked(Own):
    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.num_hooks = 0
        for p in (p for group in self.param_groups for p in group["params"]):
            p.register_post_accumulate_grad_hook(self._count)

    def _count(self, p: torch.Tensor) -> None:
        self.num_hooks += 1

    def step(self, closure: Any = None) -> None:
        assert self.num_hooks
        super().step()


class Wrapped(Optimizer):
    """Around one of torch's, whose step counts are tensors, without Optimizer's own __init__."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
        self.defaults = self.optimizer.defaults

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class Noisy(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad + 1e-3 * torch.randn_like(p), alpha=group["lr"])


class Counting(Own):
    """Keeps its number of updates where no checkpoint looks."""

    num_done = 0

    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] * (1 + self.num_done))

    def step(self, closure: Any = None) -> None:
        super().step()
        self.num_done += 1


class Listed(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        past = self.state[p].setdefault("past", [])
        past.append(p.grad.clone())  # type: ignore[union-attr]
        p.sub_(sum(past), alpha=group["lr"])


class SecondStep(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        else:
            state["exp_avg"].add_(p.grad)


class ScheduleFree(Own):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class NotFinite(Own):
    def apply(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.div_(0.0)


class NoOptimizer:
    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None: ...


def _tried(name: str, stage: int = 0) -> list[str]:
    config = RunConfig()
    config.optim.name, config.optim.learning_rate, config.optim.kwargs = f"{_HERE}.{name}", 1e-3, {}
    config.strategy.name = f"zero{stage}" if stage else "single"
    module = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.LayerNorm(40))
    return try_optimizer(config, build_optimizer(config, module), torch.device("cpu"))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", ["Own", "Prodigy", "TensorProdigy", "Regrouped", "Hooked", "Noisy"])
def test_nothing_is_said_when_an_optimizer_can_be_resumed(name: str, stage: int) -> None:
    assert _tried(name, stage) == []


def test_it_is_told_when_zero_makes_another_of_an_optimizer() -> None:
    assert _tried("Muon") == [] == _tried("Normed")
    (notice,) = _tried("Muon", 2)
    assert "treats a matrix otherwise" in notice and "strategy=zero2" in notice


@pytest.mark.parametrize(
    ("name", "is_so"), [("AdamW", True), ("NAdam", True), ("SGD", True), ("Rprop", True), ("Adafactor", False)]
)
def test_an_optimizer_of_torch_is_elementwise_when_it_treats_each_value_alone(name: str, is_so: bool) -> None:
    made = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(3))], lr=1e-3)
    assert is_elementwise(made) == is_so
    assert not is_elementwise(Muon([torch.nn.Parameter(torch.zeros(3))]))


def test_nothing_is_said_when_an_optimizer_wraps_one_of_torch() -> None:
    assert _tried("Wrapped") == []
    with pytest.raises(ConfigError, match="param_groups cannot be set"):
        _tried("Wrapped", 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [("Counting", "such as attributes of its own"), ("Listed", "among it past")],
)
def test_what_no_checkpoint_holds_is_told_when_an_optimizer_is_tried(name: str, told: str) -> None:
    (notice,) = _tried(name)
    assert told in notice and f"optim.name={_HERE}.{name}" in notice


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("SecondStep", KeyError, "exp_avg"),
        ("ScheduleFree", ConfigError, "schedule-free"),
        ("NotFinite", ConfigError, "made NaN or infinite parameters"),
        ("NoOptimizer", ConfigError, "makes no torch.optim.Optimizer but tests.unit"),
    ],
)
def test_an_optimizer_is_refused_when_it_cannot_train(name: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        _tried(name)


def test_groups_are_those_of_the_save_when_the_optimizer_went_on_since() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Own([p], d=1.0, odd=(1, 2), inf=0.0, held=torch.zeros(2, dtype=torch.bfloat16))
    groups, group = GroupState(optimizer), optimizer.param_groups[0]
    group |= {"odd": (3, 4), "inf": -math.inf, "held": torch.ones(2, dtype=torch.bfloat16), "new": 5, "lr": 7.0}
    saved = groups.moved()
    group |= {"d": 9.0, "odd": (5, 6), "inf": 1.0, "held": torch.zeros(2), "late": "x"}
    groups.load(saved)
    assert groups.moved() == saved and "late" not in group and group["lr"] == 7.0
    assert (group["d"], group["odd"], group["inf"], group["new"]) == (1.0, (3, 4), -math.inf, 5)
    assert group["held"].equal(torch.ones(2, dtype=torch.bfloat16))
    groups.load([])
    assert groups.moved() == [{}] and group["odd"] == (1, 2)
