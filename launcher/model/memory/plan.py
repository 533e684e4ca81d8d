"""The plan of a config: what it needs on a device under every strategy, what fits, and the largest micro-batch."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launcher.config.rules import contradictions
from launcher.config.settings import STRATEGIES, RunConfig, StrategyConfig
from launcher.model.memory.activations import ActivationModel, Pass, SampledLayers
from launcher.model.memory.devices import Device
from launcher.model.memory.empty import EmptyModel, OptimizerStates, build_empty
from launcher.model.memory.strategies import MemoryParts, Setting, Sizes, host_bytes, memory_parts


@dataclass(frozen=True)
class StrategyPlan:
    """Of one strategy, for the micro-batch asked for."""

    name: str
    parts: MemoryParts
    host: float
    """Bytes that a save copies to; on a CPU they count against the same memory."""
    fits: bool
    largest_micro_batch: int
    """0: not even one row fits."""


class MemoryModel:
    """Everything of a config that does not depend on the strategy, made once; `plan` then takes microseconds."""

    def __init__(self, config: RunConfig, device: Device, num_processes: int, tokenizer: Any = None) -> None:
        self.config, self.device, self.num_processes = config, device, num_processes
        self.model: EmptyModel = build_empty(config, tokenizer)
        self.states = OptimizerStates(config)
        self.sizes = Sizes.of(self.model, self.states)
        self.notices: list[str] = []
        self._activations: dict[bool, ActivationModel] = {}
        self._layers: SampledLayers | None = None

    def strategies(self) -> list[str]:
        """The names of those that this config may use, the simplest first."""
        return [name for name in STRATEGIES if self._is_possible(name)]

    def _is_possible(self, name: str) -> bool:
        if name == ("ddp" if self.num_processes == 1 else "single"):
            return False
        tried = dataclasses.replace(self.config, strategy=StrategyConfig(name, self.config.strategy.deepspeed))
        tried.launch = dataclasses.replace(tried.launch, num_processes=self.num_processes)
        return set(contradictions(tried)) <= set(contradictions(self.config))

    def plan(self, name: str, micro_batch: int | None = None) -> StrategyPlan:
        """Of a strategy, for a micro-batch (default: the config's)."""
        batch = micro_batch or self.micro_batch
        parts = self.parts(name, batch)
        snapshot = self.snapshot_bytes() if not self.device.is_cuda else 0.0
        limit = self.device.usable_bytes - snapshot
        return StrategyPlan(name, parts, snapshot, parts.total <= limit, self._largest(name, limit))

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass: never more than a process has in a step."""
        own = math.ceil(self.config.train.train_batch_size / self.num_processes)
        wanted = self.config.train.per_device_train_batch_size
        return min(wanted, own) if isinstance(wanted, int) else own

    def choose(self, plans: Sequence[StrategyPlan]) -> StrategyPlan:
        """The strategy that is asked for; with auto, and where that is impossible here, the simplest that fits; on a
        CPU the simplest: it is for trying things out."""
        wanted = next((plan for plan in plans if plan.name == self.config.strategy.name), None)
        fitting = (plan for plan in plans if plan.fits or not self.device.is_cuda)
        return wanted or next(fitting, min(plans, key=lambda plan: plan.parts.total))

    def setting(self, name: str, batch: int | None = None) -> Setting:
        """A strategy with what else decides its memory."""
        own = math.ceil(self.config.train.train_batch_size / self.num_processes)
        return Setting(
            StrategyConfig(name, self.config.strategy.deepspeed), self.num_processes,
            math.ceil(own / (batch or self.micro_batch)), self.config.mixed_precision, self.device.is_cuda,
        )  # fmt: skip

    def parts(self, name: str, batch: int) -> MemoryParts:
        """What a device holds under a strategy with a micro-batch."""
        setting = self.setting(name, batch)
        return memory_parts(self.sizes, setting, self._passes(setting, batch), self.states)

    def _largest(self, name: str, limit: float) -> int:
        low, high = 0, math.ceil(self.config.train.train_batch_size / self.num_processes)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parts(name, middle).total <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def snapshot_bytes(self) -> float:
        """Host memory of one process for the copy that a save takes: its share of the checkpoint."""
        checkpoint = self.config.checkpoint
        if checkpoint.save_strategy == "no":
            return 0.0
        trained = sum(p.numel * p.dtype.itemsize for p in self.model.trained)
        frozen = 0 if self.config.model.is_adapter else sum(p.numel * p.dtype.itemsize for p in self.model.frozen)
        masters = (
            0 if checkpoint.save_only_model else sum(4 * p.numel for p in self.model.trained if p.dtype.itemsize < 4)
        )
        states = 0 if checkpoint.save_only_model else self.sizes.plain_states
        return (trained + frozen + masters + states) / self.num_processes

    def offloaded_bytes(self, name: str) -> int:
        """Host memory of one process for what a strategy keeps there instead of on its device."""
        return host_bytes(self.sizes, self.setting(name), 0.0)["offloaded"] if self.device.is_cuda else 0

    def _passes(self, setting: Setting, batch: int) -> Pass:
        dtype, has_autocast = setting.forward_dtype, setting.mixed_precision != "no" and not setting.stage
        if has_autocast not in self._activations:
            is_zero = bool(setting.stage)
            self._activations[has_autocast] = ActivationModel(
                self._sampled(), trained_dtype=dtype if is_zero else torch.float32,
                frozen_dtype=dtype if is_zero else None, autocast=dtype if has_autocast else None,
                is_packed=self.config.data.packing, num_tokens=self.config.data.max_length,
            )  # fmt: skip
        return self._activations[has_autocast].at(batch)

    def _sampled(self) -> SampledLayers:
        if self._layers is None:
            settings, module = self.config.model, self.model.module
            if settings.gradient_checkpointing:
                with warnings.catch_warnings(action="ignore"):  # a method that transformers renamed
                    module.gradient_checkpointing_enable({"use_reentrant": False})
                if settings.is_adapter:
                    module.enable_input_require_grads()
            self._layers = SampledLayers(module, is_fused=self.config.train.fused_loss, kind=self.device.kind)
        return self._layers
