"""Everything of a run that a checkpoint holds, beside the tensors: progress, scheduler, scaler, random streams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.base import _deepspeed, files, manifest
from launcher.base.errors import DamagedCheckpointError
from launcher.base.files import to_text
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.base.processes import Processes
from launcher.base.stored import StoredTensors
from launcher.checkpoint import rng
from launcher.checkpoint.group_state import GroupState, tensor_kinds
from launcher.checkpoint.load import load_masters, load_trained_state, set_masters, set_rows
from launcher.checkpoint.segments import TrainedState, collect, read_scalars
from launcher.checkpoint.snapshot import SnapshotPlan, plan_snapshot
from launcher.config.settings import RunConfig
from launcher.model.build import saved_dtype, weights_stem
from launcher.model.optim import Schedule
from launcher.model.vocabulary import NewRows
from launcher.saving.log_history import LogHistory

STATE_VERSION = 1


@dataclass
class ProgressState:
    """Where the run is. Sums are since the last line of metrics.jsonl; `best_step` is that of the best checkpoint."""

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0
    loss_sum: float = 0.0
    labelled_tokens: int = 0
    stopping_best: float | None = None
    """The metric that early stopping compares with; not the best checkpoint's, which needs a save."""
    evals_without_gain: int = 0
    seconds_since_eval: float = 0.0
    """Of training, over all starts: a run that is stopped again and again is evaluated by the clock all the same."""
    router_loss_sum: float = 0.0
    counted_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps that were applied, for `train.on_spike`."""
    spikes: list[int] = field(default_factory=list)
    """The last steps that were left out because their loss spiked."""
    left_out: list[list[int]] = field(default_factory=list)
    """First and last of the steps that rollbacks left out."""
    best_metric: float | None = None
    best_step: int | None = None
    log_history: LogHistory = field(default_factory=LogHistory)


class TrainingState:
    """Collects what `accelerator.save_state` hands to the checkpointer, and restores it for `load_state`."""

    def __init__(
        self, config: RunConfig, paths: RunPaths, processes: Processes, model: torch.nn.Module, optimizer: Any,
        schedule: Schedule, scaler: Any, total_steps: int, stored: StoredTensors,
    ) -> None:  # fmt: skip
        self._config, self._paths, self._processes = config, paths, processes
        self._module: torch.nn.Module = getattr(model, "module", model)
        self._optimizer, self._schedule, self._total_steps = optimizer, schedule, total_steps
        self._scaler, self._stored = scaler, stored
        self.progress = ProgressState()
        self.settings: dict[str, Any] = {}
        self.origin: str | None = None  # origin_id of the explicit path that this run started from
        self.trained: TrainedState = collect(model, optimizer, rank=processes.rank, world_size=processes.world_size)
        self._groups = GroupState(self.trained.optimizer)
        self._planned: tuple[object, SnapshotPlan] | None = None

    def judge_anew(self) -> None:
        """Another metric than before decides."""
        p = self.progress
        p.stopping_best, p.evals_without_gain = p.best_metric, 0
        self._schedule.judge_anew()

    def take_first_masters(self, weights: Mapping[str, Tensor] | Path, new_rows: NewRows) -> None:
        """Makes the masters those of the weights that the run begins with: parameters by name, or a model's folder,
        which does not have the new rows."""
        if isinstance(weights, Path):
            load_masters(self.trained, weights, self._stored, weights_stem(self._config))
            set_rows(self.trained, new_rows.ids, new_rows.content)
        else:
            set_masters(self.trained, weights)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    def plan(self, only_model: bool) -> SnapshotPlan:
        """What a save stores; made once, and anew where the optimizer has got other states since (its first ones)."""
        signature = (only_model, *(s.signature for s in self.trained.segments))
        if self._planned is None or self._planned[0] != signature:
            plan = plan_snapshot(
                self.trained, self._module, dtype=saved_dtype(self._config), weights_stem=weights_stem(self._config),
                stored=self._stored, only_model=only_model, rank=self._processes.rank,
            )  # fmt: skip
            self._planned = signature, plan
        return self._planned[1]

    # ------------------------------------------------------------------ save

    def texts(self) -> dict[str, str]:
        """The small files of this process at the current step, by path relative to the checkpoint."""
        texts = {}
        if not self._config.checkpoint.save_only_model:
            own: dict[str, Any] = rng.capture()
            if any(moved := self._groups.moved()):  # under ZeRO an optimizer may find something else on each process
                own["optimizer_groups"] = moved
            texts[f"state/rng-{self._processes.rank:05d}.json"] = json.dumps(own)
        if self._processes.is_main:
            texts["trainer_state.json"] = self.progress.log_history.written_with(self._trainer_state())
            if not self._config.checkpoint.save_only_model:
                texts["state/state.json"] = to_text(self._state())
        return texts

    def _state(self) -> dict[str, Any]:
        progress = {k: v for k, v in vars(self.progress).items() if k != "log_history"}
        return {
            "version": STATE_VERSION,
            "step": self.progress.step,
            "total_steps": self._total_steps,
            "seed": self._config.seed,
            "samples_seen": self.progress.step * self._config.train.train_batch_size,
            "world_size": self._processes.world_size,
            "strategy": self._config.strategy.name,
            "progress": progress,
            "scheduler": self._schedule.state(),
            "scaler": self._scaler_state(),
            "optimizer": self._optimizer_state(),
            "settings": self.settings,
            "origin": self.origin,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        groups, segments = [], self.trained.segments
        scalars = list(zip(segments, read_scalars(segments), strict=True))
        for i, group in enumerate(self.trained.optimizer.param_groups):
            by_scalars: dict[str, list[str]] = {}
            own = {e.param: found for s, found in scalars if s.group == i and s.is_whole for e in s.extents}
            shared: dict[str, Any] = next((found for s, found in scalars if s.group == i), {})
            for info in self.trained.params:
                if info.group == i:
                    by_scalars.setdefault(json.dumps(own.get(info.name, shared)), []).append(info.name)
            kinds = tensor_kinds([s for s in segments if s.group == i])
            settings = {
                k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, list, tuple)) and k != "params"
            }
            groups += [
                {"group": i, "params": names, "scalars": json.loads(s), "settings": settings, "tensors": kinds}
                for s, names in by_scalars.items()
            ]
        return {
            "name": self._config.optim.name, "groups": groups, "partition": self.trained.partition,
            "moved": self._groups.moved(),
        }  # fmt: skip

    def _scaler_state(self) -> dict[str, Any] | None:
        loss_scaler = _deepspeed.loss_scaler(self._optimizer_inner())
        if loss_scaler is not None and self._config.mixed_precision == "fp16":
            return {k: v for k, v in vars(loss_scaler).items() if isinstance(v, (int, float, bool))}
        return dict(self._scaler.state_dict()) if self._scaler is not None else None

    def _optimizer_inner(self) -> Any:
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _trainer_state(self) -> dict[str, Any]:
        """transformers' schema, so that its tools read it; without log_history."""
        p, config = self.progress, self._config
        best = self._paths.checkpoint_dir(p.best_step) if p.best_step is not None else None
        return {
            "best_global_step": p.best_step, "best_metric": p.best_metric,
            "best_model_checkpoint": best.name if best else None,  # beside this one; no path of this machine
            "epoch": p.epoch, "eval_steps": config.eval.eval_steps, "global_step": p.step,
            "is_hyper_param_search": False, "is_local_process_zero": True, "is_world_process_zero": True,
            "logging_steps": config.train.logging_steps, "max_steps": self._total_steps,
            "num_input_tokens_seen": p.num_tokens, "num_train_epochs": config.train.num_train_epochs,
            "save_steps": config.checkpoint.save_steps, "stateful_callbacks": {}, "total_flos": 0.0,
            "train_batch_size": config.train.per_device_train_batch_size, "trial_name": None, "trial_params": None,
        }  # fmt: skip

    # ------------------------------------------------------------------ load

    def load(self, folder: Path) -> None:
        """Restores everything from a checkpoint folder. Collective.

        Raises:
            DamagedCheckpointError: its bytes are those of its manifest, but its values are none of a training state.
        """
        try:
            self._load(folder)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise DamagedCheckpointError(f"{folder} holds no state that can be loaded: {error!r:.300}") from error

    def _load(self, folder: Path) -> None:
        path = CheckpointPaths(folder)
        listed = manifest.read(folder).paths
        state = files.read_json(path.run_state, within=folder)
        load_trained_state(
            self.trained, self._module, folder, state["optimizer"],
            weights_stem=weights_stem(self._config), stored=self._stored, listed=listed,
        )  # fmt: skip
        self._groups.load(state["optimizer"].get("moved", []))
        _deepspeed.refresh_forward_weights(self._optimizer_inner())
        self._load_scaler(state["scaler"])
        self._schedule.load(state["scheduler"], state["step"])
        text = files.read_text(path.trainer_state, files.MAX_HISTORY_BYTES, within=folder)
        self.progress = ProgressState(**state["progress"], log_history=LogHistory.read(text))
        if self.progress.step != state["step"]:
            raise ValueError("its progress is of another step")
        rng_path = path.state_dir / f"rng-{self._processes.rank:05d}.json"
        is_saved = rng_path.relative_to(folder).as_posix() in listed
        if is_saved and state["world_size"] == self._processes.world_size:
            own = files.read_json(rng_path, within=folder)
            rng.restore(own)
            if "optimizer_groups" in own:
                self._groups.load(own["optimizer_groups"])

    def _load_scaler(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        loss_scaler = _deepspeed.loss_scaler(self._optimizer_inner())
        if self._scaler is not None:
            self._scaler.load_state_dict(state)
        elif loss_scaler is not None:
            vars(loss_scaler).update({k: v for k, v in state.items() if k in vars(loss_scaler)})
