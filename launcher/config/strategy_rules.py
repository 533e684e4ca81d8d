"""The rules of the group `strategy`: what `strategy.deepspeed` may say beside the other settings. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.settings import AUTO, RunConfig

DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "nebula",
    "optimizer", "pipeline", "prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""What DeepSpeed 0.19.8 asks its settings for, those included that it refuses as removed."""
_IS_MISTYPED = 0.8
"""Of difflib. DeepSpeed passes over keys that it does not know, and another version may know more: only what looks like
a slip of the keyboard is refused."""
_SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16")


def strategy_problems(config: RunConfig) -> Iterator[str]:
    """Where `strategy.deepspeed`, which is merged over our own, says something else than the other settings."""
    given = config.strategy.deepspeed
    for name in given:
        close = difflib.get_close_matches(name, DEEPSPEED_KEYS, n=1, cutoff=_IS_MISTYPED)
        if name not in DEEPSPEED_KEYS and close:
            yield (
                f"strategy.deepspeed.{name} is not a setting of DeepSpeed's, which would pass over it. "
                f"Did you mean strategy.deepspeed.{close[0]}?"
            )
    for name in _SECTIONS:
        if name in given and not isinstance(given[name], dict):
            yield (
                f"strategy.deepspeed.{name} must be a group of settings (got {given[name]!r}). "
                f"Set strategy.deepspeed.{name}.NAME=VALUE, or leave it out"
            )
    yield from _batch_problems(config)
    yield from _stage_problems(config)
    yield from _precision_problems(config)
    for name, ours in (("optimizer", "optim.name"), ("scheduler", "scheduler.lr_scheduler_type")):
        if name in given:
            yield (
                f"strategy.deepspeed.{name} contradicts {ours}={_value_of(config, ours)}, which is what runs. Leave "
                f"strategy.deepspeed.{name} out and set {ours}=NAME"
            )


def strategy_notices(config: RunConfig) -> Iterator[str]:
    name = config.strategy.name
    if config.strategy.deepspeed and name != AUTO and not config.strategy.zero_stage:
        keys = ", ".join(config.strategy.deepspeed)
        yield f"strategy.deepspeed ({keys}) has no effect under strategy={name}. To use it: strategy=zero2"


def _value_of(config: RunConfig, key: str) -> Any:
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def _batch_problems(config: RunConfig) -> Iterator[str]:
    given = config.strategy.deepspeed
    pairs = {"train_batch_size": "train_batch_size", "train_micro_batch_size_per_gpu": "per_device_train_batch_size"}
    for theirs, ours in pairs.items():
        value = given.get(theirs, AUTO)
        if value not in (AUTO, getattr(config.train, ours)):
            yield (
                f"strategy.deepspeed.{theirs}={value} contradicts train.{ours}={getattr(config.train, ours)}. "
                f"Leave strategy.deepspeed.{theirs} out and set train.{ours}={value}"
            )
    if (steps := given.get("gradient_accumulation_steps", AUTO)) not in (AUTO, 1):
        processes, size = config.launch.num_processes or 1, config.train.micro_batch_size
        samples = size * processes * steps if isinstance(steps, int) else "SAMPLES"
        yield (
            f"strategy.deepspeed.gradient_accumulation_steps={steps} is not what decides: accumulation follows from "
            f"train.train_batch_size={config.train.train_batch_size}, train.per_device_train_batch_size and the number "
            f"of processes. Leave it out and set train.train_batch_size={samples} ({size} * {processes} * {steps})"
        )


def _stage_problems(config: RunConfig) -> Iterator[str]:
    strategy = config.strategy
    stage = _section(strategy.deepspeed, "zero_optimization").get("stage", AUTO)
    is_one = type(stage) is int and 0 <= stage <= 3
    if (
        stage == AUTO
        or (strategy.name != AUTO and not strategy.zero_stage)
        or (is_one and stage == strategy.zero_stage)
    ):
        return
    mend = f"strategy={f'zero{stage}' if stage else 'ddp'}" if is_one else "strategy=zero1, zero2 or zero3"
    key = "strategy.deepspeed.zero_optimization.stage"
    yield f"{key}={stage} contradicts strategy={strategy.name}. Leave it out and set {mend}"


def _precision_problems(config: RunConfig) -> Iterator[str]:
    for name, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        value = _section(config.strategy.deepspeed, name).get("enabled", AUTO)
        is_enabled = config.mixed_precision == name.replace("bfloat16", "bf16")
        if value not in (AUTO, is_enabled):
            mend = f"model.dtype={dtype if value is True else 'float32'}"
            yield (
                f"strategy.deepspeed.{name}.enabled={str(value).lower()} contradicts model.dtype={config.model.dtype}. "
                f"Leave it out and set {mend}"
            )


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = given.get(name)
    return section if isinstance(section, dict) else {}
