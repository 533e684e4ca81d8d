"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig
from launcher.model.schedules import build_scheduler


def norm_names(model: torch.nn.Module) -> set[str]:
    """Of the modules whose parameters get no weight decay."""
    return {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}


def is_decayed(name: str, norms: set[str]) -> bool:
    """Whether a parameter gets weight decay, and so belongs to the first group."""
    return name.rpartition(".")[0] not in norms and not name.endswith("bias")


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Two parameter groups: with weight decay, and (norms and biases) without.

    Raises:
        ConfigError: `optim.name` is no optimizer class, or refuses its arguments.
    """
    norms = norm_names(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if is_decayed(n, norms)], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in trained if not is_decayed(n, norms)], "weight_decay": 0.0},
    ]
    return make_optimizer(config, [g for g in groups if g["params"]])


def make_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`optim.name` for parameter groups.

    Raises:
        ConfigError: it is no optimizer class, or refuses its arguments.
    """
    optim = config.optim
    module, _, name = optim.name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            [f"optim.name={optim.name} cannot be imported ({error}). Example: torch.optim.AdamW"]
        ) from error
    try:
        optimizer: torch.optim.Optimizer = cls(
            groups, lr=optim.learning_rate, **fused_arguments(cls, optim.kwargs), **optim.kwargs
        )
    except (TypeError, ValueError) as error:
        raise ConfigError([f"optim.name={optim.name} refuses its arguments: {error}. See optim.kwargs"]) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError([
            f"optim.name={optim.name} makes no torch.optim.Optimizer but {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}. Derive it from that class. Example: torch.optim.AdamW"
        ])  # fmt: skip
    return optimizer


_IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}


def fused_arguments(cls: Any, kwargs: Mapping[str, Any]) -> dict[str, bool]:
    """One pass over memory for an update instead of a dozen, where torch has such a kernel and nothing else was asked
    for. Without it torch takes the slowest form on the CPU."""
    if _IMPLEMENTATIONS & kwargs.keys() or not isinstance(cls, type):
        return {}
    of_torch = [base for base in cls.__mro__ if base.__module__.startswith("torch.optim.")]
    has_kernel = any("fused" in inspect.signature(base).parameters for base in of_torch)
    own = inspect.signature(cls).parameters.values()
    takes_it = any(p.name == "fused" or p.kind is p.VAR_KEYWORD for p in own)
    return {"fused": True} if has_kernel and takes_it else {}


class Schedule:
    """transformers' learning-rate schedulers, counted in optimizer steps.

    Accelerate's own wrapper steps them num_processes times for each optimizer step, so it is not used.
    """

    def __init__(self, config: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        settings = config.scheduler
        warmup = settings.warmup_steps
        num_warmup = math.ceil(warmup * total_steps) if 0 < warmup < 1 else int(warmup)
        try:
            self._scheduler: Any = build_scheduler(
                settings.lr_scheduler_type, optimizer, num_warmup_steps=num_warmup, num_training_steps=total_steps,
                kwargs=dict(settings.lr_scheduler_kwargs),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            name = f"scheduler.lr_scheduler_type={settings.lr_scheduler_type}"
            raise ConfigError([f"{name}: {error}. See scheduler.lr_scheduler_kwargs"]) from error
        self._optimizer = optimizer

    @property
    def learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """After each optimizer step."""
        if not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    def evaluated(self, metric: float) -> None:
        """After each evaluation; only reduce_lr_on_plateau looks at it."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(metric)

    def judge_anew(self) -> None:
        """Another metric than before decides: reduce_lr_on_plateau compares the next one with nothing."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler._reset()

    def state(self) -> dict[str, Any]:
        """Plain data."""
        kept = {k: v for k, v in self._scheduler.state_dict().items() if isinstance(v, (int, float, str, bool, list))}
        kept.pop("lr_lambdas", None)
        return {"values": kept, "learning_rates": [g["lr"] for g in self._optimizer.param_groups]}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Goes to `step` of this schedule; what does not follow from the step is taken from the stored state."""
        values = {k: v for k, v in state["values"].items() if k not in ("base_lrs", "_last_lr", "lr_lambdas")}
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.__dict__.update(values)
            for group, lr in zip(self._optimizer.param_groups, state["learning_rates"], strict=True):
                group["lr"] = lr
            return
        assert isinstance(self._scheduler, LRScheduler)
        self._scheduler.last_epoch = step
        self._scheduler._step_count = step + 1
        base = self._scheduler.base_lrs
        lambdas = self._scheduler.lr_lambdas  # type: ignore[attr-defined]
        rates = [b * f(step) for b, f in zip(base, lambdas, strict=True)]
        for group, lr in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self._scheduler._last_lr = rates
