"""Accelerate, with checkpoints that are ours: same `save_state` and `load_state`, other files underneath."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from launcher.agent.interface import check_loopback
from launcher.base import _deepspeed
from launcher.base.devices import precision_problems
from launcher.base.errors import ConfigError
from launcher.base.paths import RunPaths
from launcher.base.processes import COLLECTIVE_TIMEOUT
from launcher.config.settings import AUTO, RunConfig


class Saves(Protocol):
    """What begins a save (`checkpoint.engine.Checkpointer`)."""

    def save(self, step: int, texts: dict[str, str], target: Path) -> float: ...

    def finish_snapshot(self) -> None: ...


class State(Protocol):
    """What collects and restores the training state (`saving.training_state.TrainingState`)."""

    @property
    def step(self) -> int: ...

    def texts(self) -> dict[str, str]: ...

    def load(self, folder: Path) -> None: ...


class LauncherAccelerator(Accelerator):
    """Accelerate, whose `save_state` snapshots into a folder that is written in the background, and whose `load_state`
    restores one, under any number of processes and any ZeRO stage.

    Accelerate's own writes are replaced: they are pickled, in place, not durable, and leave out the data position.
    """

    def attach(self, state: State, saves: Saves) -> None:
        """Gives what the two calls below work with; after `prepare`."""
        self._training_state, self._saves = state, saves

    def unwrap_model(
        self, model: torch.nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> Any:
        """Accelerate's own imports all of DeepSpeed to ask whether the model is one of its engines."""
        is_plain = type(model).__module__ != "deepspeed.runtime.engine" and not hasattr(model, "_orig_mod")
        if not is_plain or not keep_fp32_wrapper:
            return super().unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)
        return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

    def save_state(
        self, output_dir: str | None = None, safe_serialization: bool = True, **save_model_func_kwargs: Any
    ) -> str:
        """Snapshots the state of the current step into `output_dir`. Collective.

        The folder appears under that name once everything in it is durable, written in the background; see
        `Checkpointer.save` for what a crash leaves and `Checkpointer.wait` for how to wait. It must not exist yet.

        Returns:
            The folder.

        Raises:
            ValueError: no folder was named. There is no automatic naming here: the loop names `checkpoint-N`.
        """
        if output_dir is None:
            raise ValueError("save_state needs output_dir: the checkpoint's folder, such as RUN/checkpoint-500")
        folder = Path(output_dir).absolute()
        self._saves.save(self._training_state.step, self._training_state.texts(), folder)
        return str(folder)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Restores the state from a checkpoint folder that `save_state` made. Collective.

        Raises:
            ValueError: no folder was named.
        """
        if input_dir is None:
            raise ValueError("load_state needs input_dir: a checkpoint's folder, such as RUN/checkpoint-500")
        self._saves.finish_snapshot()  # of a save that was just begun, whose sources are overwritten now
        self._training_state.load(Path(input_dir).absolute())


def use_single_process_env() -> None:
    """DeepSpeed wants a process group even for one process, which `accelerate launch` does not describe.

    Raises:
        UserError: it cannot be opened here. The agent has not asked where `strategy=auto` became ZeRO only now.
    """
    if "WORLD_SIZE" not in os.environ:
        check_loopback()
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        os.environ.setdefault(name, value)


def build_accelerator(config: RunConfig) -> LauncherAccelerator:
    """The accelerator for `strategy`, on CUDA (nccl) or CPU (gloo); of torch's kernels those that `full_determinism`
    asks for, whoever computes: what evaluates in the background decides which checkpoint is the best.

    Raises:
        ConfigError: there is no fp16 on this device; Accelerate would train fp32 without a word.
    """
    has_cuda = torch.cuda.is_available()
    if problems := precision_problems(config.model.dtype, has_gpu=has_cuda):
        raise ConfigError(problems)
    if config.train.full_determinism:
        torch.use_deterministic_algorithms(True)
    handlers: list[Any] = [InitProcessGroupKwargs(backend="nccl" if has_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)]
    logs = str(RunPaths(Path(config.output_dir).expanduser().resolve()).logs_dir)
    arguments: dict[str, Any] = {
        "mixed_precision": config.mixed_precision, "log_with": config.tracker.name, "project_dir": logs,
    }  # fmt: skip
    if config.strategy.zero_stage:
        use_single_process_env()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not has_cuda:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            _deepspeed.build_cpu_collectives()
        arguments["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, has_cuda))
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        arguments["cpu"] = not has_cuda
        if not _has_process_group():  # given a backend, Accelerate expects one
            handlers = []
        else:
            # With find_unused_parameters DDP keeps the buckets that it starts with. Without, it rebuilds them after its
            # first backward (torch's reducer.cpp), so that a resumed run sums its first step in another order.
            handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=True))
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that an operator was built
        return LauncherAccelerator(kwargs_handlers=handlers, **arguments)


def _has_process_group() -> bool:
    """Whether Accelerate opens one, without DeepSpeed: also for a single process that an agent gave a rank."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("LOCAL_RANK", -1)) >= 0


def deepspeed_config(config: RunConfig, has_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's settings for a strategy; `strategy.deepspeed` is merged over them.

    gradient_accumulation_steps is 1: the loop itself marks the boundary, since the number of micro-steps may vary and
    the loss is already normalised over the whole optimizer step.
    """
    # ZeRO-1 and 2 wait for the device to overlap, in every micro-batch: a process alone has nothing to wait for.
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 and config.strategy.zero_stage < 3
    zero: dict[str, Any] = {
        "stage": config.strategy.zero_stage, "overlap_comm": has_cuda and not is_alone, "contiguous_gradients": True,
    }  # fmt: skip
    if config.strategy.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.mixed_precision == "bf16"},
        "fp16": {"enabled": config.mixed_precision == "fp16"},
        "steps_per_print": 10**12,
    }
    if config.strategy.is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_cuda}
        zero["offload_param"] = {"device": "cpu", "pin_memory": has_cuda}
    merged = _merged(settings, config.strategy.deepspeed)
    merged.pop("train_batch_size", None)  # its accumulation is not ours
    merged["train_micro_batch_size_per_gpu"] = config.train.per_device_train_batch_size  # may have been halved
    offload = merged["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":  # also where strategy.deepspeed asks for it under another stage
        merged.setdefault("zero_force_ds_cpu_optimizer", has_cuda and is_plain_adamw(config))
    return merged


def is_plain_adamw(config: RunConfig) -> bool:
    """Whether DeepSpeed's CPU Adam, which Accelerate puts into the place of any optimizer under offload, computes what
    `optim` asks for. Every other optimizer runs as it is, on the host: slower, and not silently another."""
    kwargs = config.optim.kwargs
    return config.optim.name == "torch.optim.AdamW" and not any(kwargs.get(key) for key in ("amsgrad", "maximize"))


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`auto`, which DeepSpeed's settings of the Trainer hold, means ours."""
    over = {key: value for key, value in over.items() if key not in base or value != AUTO}
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = _merged(base[key], over[key])
    return merged
