"""The rules between settings: every one that is broken, each with the override that mends it. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from launcher.base.errors import not_allowed
from launcher.base.paths import default_cache_dir
from launcher.config import sbatch
from launcher.config.background_rules import background_problems
from launcher.config.data_rules import data_problems, evaluating
from launcher.config.launch_rules import folder_problems, launch_problems, secret_problems
from launcher.config.model_rules import model_problems
from launcher.config.optimizers import optimizer_problems
from launcher.config.settings import (
    AUTO,
    MIXED_PRECISION,
    CheckpointConfig,
    DataConfig,
    RunConfig,
    expand_files,
)
from launcher.config.strategy_rules import strategy_notices, strategy_problems
from launcher.config.trackers import tracker_problems

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""ORG/NAME, or NAME of the token's own user."""


def contradictions(config: RunConfig, explicit: Collection[str] = ()) -> list[str]:
    """Every rule that is broken.

    Args:
        explicit: keys that the user set for this very run. `load_best_model_at_end` comes with the recommended choice,
            where it means "if there is a best one"; only who sets it himself is told that there cannot be one.
    """
    problems: list[str] = []
    for rule in _RULES:
        try:
            problems.extend(rule(config))
        except PermissionError as error:
            problems.append(not_allowed(error.filename))
    if "checkpoint.load_best_model_at_end" in explicit:
        problems += _best_model_problems(config)
    return problems


def notices(config: RunConfig) -> list[str]:
    """What a user should know before the run starts although nothing is wrong."""
    return [*_file_notices(config.data), *_eval_notices(config), *_slurm_notices(config), *strategy_notices(config)]


def _file_notices(data: DataConfig) -> Iterator[str]:
    for key, names in (("train_files", data.train_files), ("eval_files", data.eval_files)):
        files = expand_files([names] if isinstance(names, str) else list(names))
        for path, count in Counter(files).items():
            if count > 1:
                yield f"data.{key} names {path} {count} times: every row of it counts {count} times"


def _eval_notices(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("eval_files", "eval_split") if getattr(config.data, key)]
    if given and config.eval.eval_strategy == "no":
        yield f"data.{given[0]} is not used: eval.eval_strategy=no. To evaluate: eval.eval_strategy=steps"


def _slurm_notices(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    for key in launch.sbatch:
        if not sbatch.is_option(key):
            meant = sbatch.meant_option(key)
            hint = f" Did you mean launch.sbatch.{meant}?" if meant else " Options have their long names"
            yield f"launch.sbatch.{key} is no option of sbatch that is known here; it is passed on.{hint}"
    num_gpus = (launch.gpus_per_node or 0) * launch.num_machines
    if launch.num_processes and launch.num_processes < num_gpus:
        yield (
            f"launch.num_processes={launch.num_processes} leaves {num_gpus - launch.num_processes} of {num_gpus} GPUs "
            f"without a process. To use all: launch.num_processes={num_gpus}"
        )


def resource_notices(config: RunConfig) -> Iterator[str]:
    """What a job does not ask Slurm for, so that the cluster's defaults count: often an hour and one core."""
    options = {key.replace("_", "-") for key, value in config.launch.sbatch.items() if value not in (None, False)}
    if not options & {"time"}:
        yield "no time limit is asked for: the partition's default counts. To ask: launch.sbatch.time=\"'12:00:00'\""
    if "exclusive" in options:
        return
    per_node = max(1, (config.launch.num_processes or config.launch.gpus_per_node or 1) // config.launch.num_machines)
    per_node = max(per_node, config.launch.gpus_per_node or 1)
    if not options & {"cpus-per-task", "cpus-per-gpu", "cores-per-socket", "mincpus"}:
        yield (
            f"no cores are asked for: Slurm's default is one for all {per_node} processes of a node. To ask: "
            f"launch.sbatch.cpus-per-task={8 * per_node}, or launch.sbatch.exclusive=true"
        )
    if not options & {"mem", "mem-per-cpu", "mem-per-gpu"}:
        yield "no memory is asked for: the cluster's default counts. To ask: launch.sbatch.mem=64G (a node; 0: all)"


def cache_problems(config: RunConfig) -> Iterator[str]:
    """Asked where a run starts, not wherever settings are read: a cache need not be writable to show them."""
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else default_cache_dir()
    tokens = folder.absolute() / "tokens"
    above = next(p for p in (tokens, *tokens.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = f"{above} is {'not writable' if above.is_dir() else 'no folder'}"
        yield f"tokenised data cannot be kept in {folder}: {why}. Set data.cache_dir=FOLDER"


def _eval_problems(config: RunConfig) -> Iterator[str]:
    data, ev, ck = config.data, config.eval, config.checkpoint
    if ev.eval_strategy == "no":
        if ev.eval_every_s is not None:
            yield (
                f"eval.eval_every_s={ev.eval_every_s:g} evaluates but eval.eval_strategy=no. "
                f"Set {evaluating(data)}, or eval.eval_every_s=null"
            )
        if config.scheduler.lr_scheduler_type == "reduce_lr_on_plateau":
            yield (
                "scheduler.lr_scheduler_type=reduce_lr_on_plateau follows an evaluation but eval.eval_strategy=no. "
                f"Set {evaluating(data)}"
            )
        return
    if not (data.eval_files or data.eval_split or data.generator):
        yield (
            f"eval.eval_strategy={ev.eval_strategy} but there is no evaluation data. Set data.eval_files=[FILE], "
            "data.eval_split=0.01, or eval.eval_strategy=no"
        )
    if not ev.metric and ck.metric_key != "eval_loss":
        yield (
            f"checkpoint.metric_for_best_model={ck.metric_for_best_model} is measured by nothing: without eval.metric "
            "an evaluation gives eval_loss alone. Set "
            "checkpoint.metric_for_best_model=loss, or eval.metric._target_=CLASS"
        )


def _precision_problems(config: RunConfig) -> Iterator[str]:
    wanted, implied = config.train.mixed_precision, MIXED_PRECISION[config.model.dtype]
    if wanted is not None and wanted != implied:
        dtype = next(d for d, p in MIXED_PRECISION.items() if p == wanted)
        yield (
            f"train.mixed_precision={wanted} contradicts model.dtype={config.model.dtype} (which means {implied}). "
            f"Set model.dtype={dtype}, or train.mixed_precision=null"
        )


def _length_problems(config: RunConfig) -> Iterator[str]:
    steps, epochs = config.train.max_steps, config.train.num_train_epochs
    look = "To train nothing and only look: launcher plan, or launcher preview"
    if steps == 0:
        yield f"train.max_steps must be at least 1, or -1 for train.num_train_epochs (got 0). {look}"
    elif steps < 0 and not 0 < epochs < math.inf:
        yield (
            f"train.num_train_epochs must be above 0, and finite where train.max_steps is not set (got {epochs:g}): "
            f"train.num_train_epochs=1. {look}"
        )


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    ck = config.checkpoint
    if ck.save_total_limit is not None and ck.save_total_limit < 1:
        yield (
            f"checkpoint.save_total_limit must be at least 1 (got {ck.save_total_limit}). "
            "To keep no checkpoints: checkpoint=off"
        )
    if isinstance(size := config.train.per_device_train_batch_size, str) and size != AUTO:
        yield f"train.per_device_train_batch_size must be a whole number or auto (got {size!r})"
    if isinstance(ck.save_steps, str) and ck.save_steps != "auto":
        yield f"checkpoint.save_steps must be a whole number or auto (got {ck.save_steps!r})"
    if isinstance(ck.save_steps, int) and ck.save_steps < 1:
        yield (
            f"checkpoint.save_steps must be at least 1 (got {ck.save_steps}). To save only at the end: "
            "checkpoint.save_steps=1000000000; never: checkpoint=off"
        )
    if ck.mtbf_s == math.inf:
        yield "checkpoint.mtbf_s must be finite (got inf). A failure a year: checkpoint.mtbf_s=31536000"
    if config.optim.learning_rate == math.inf:
        yield "optim.learning_rate must be finite (got inf). The default is optim.learning_rate=5e-05"
    if ck.save_strategy == "best" and config.eval.eval_strategy == "no":
        yield (
            "checkpoint.save_strategy=best needs an evaluation to compare by, but eval.eval_strategy=no. "
            f"Set {evaluating(config.data)}, or checkpoint.save_strategy=steps"
        )
    if ck.save_every_s is not None and ck.save_strategy == "no":
        yield (
            f"checkpoint.save_every_s={ck.save_every_s:g} saves but checkpoint.save_strategy=no. "
            "Set checkpoint.save_strategy=steps, or checkpoint.save_every_s=null"
        )
    yield from _resume_problems(ck)


def _resume_problems(ck: CheckpointConfig) -> Iterator[str]:
    path = ck.resume_from_checkpoint
    if path in ("auto", "never"):
        return
    if path.startswith("hf://"):
        if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+(/[^@\s]+)?(@[^\s@]+)?", path):
            yield f"checkpoint.resume_from_checkpoint={path} must be hf://ORG/NAME or hf://ORG/NAME@REVISION"
    elif not Path(path).expanduser().is_dir():
        yield (
            f"checkpoint.resume_from_checkpoint={path} is no folder. Valid: auto, never, a checkpoint folder, "
            "hf://ORG/NAME[@revision]"
        )


def _early_stopping_problems(config: RunConfig) -> Iterator[str]:
    if config.train.early_stopping_patience is not None and config.eval.eval_strategy == "no":
        yield (
            f"train.early_stopping_patience={config.train.early_stopping_patience} but eval.eval_strategy=no: nothing "
            f"is measured. Set {evaluating(config.data)}, or train.early_stopping_patience=null"
        )


def _spike_problems(config: RunConfig) -> Iterator[str]:
    if config.train.on_spike != "rollback":
        return
    ck = config.checkpoint
    if ck.save_strategy == "no" or ck.save_only_model:
        what = "save_strategy=no" if ck.save_strategy == "no" else "save_only_model=true"
        mend = "checkpoint=recommended" if ck.save_strategy == "no" else "checkpoint.save_only_model=false"
        yield (
            f"train.on_spike=rollback goes back to a checkpoint but checkpoint.{what}. "
            f"Set {mend}, or train.on_spike=skip"
        )


def _best_model_problems(config: RunConfig) -> Iterator[str]:
    if config.checkpoint.load_best_model_at_end and (why := _why_no_best(config)):
        mend = "checkpoint=recommended" if config.checkpoint.save_strategy == "no" else evaluating(config.data)
        key = "checkpoint.load_best_model_at_end"
        yield f"{key}=true but {why}. Set {mend}, or {key}=false"


def _why_no_best(config: RunConfig) -> str:
    if config.checkpoint.save_strategy == "no":
        return "checkpoint.save_strategy=no"
    return "eval.eval_strategy=no" if config.eval.eval_strategy == "no" else ""


def _hub_problems(config: RunConfig) -> Iterator[str]:
    hub = config.hub
    for key in ("hub_model_id", "bucket"):
        name = getattr(hub, key)
        if name is not None and not REPO_ID.fullmatch(name):
            yield f"hub.{key} must be ORG/NAME (got {name!r})"
    if hub.push_to_hub and config.checkpoint.save_strategy == "no" and hub.hub_strategy != "end":
        yield (
            f"hub.hub_strategy={hub.hub_strategy} sends checkpoints but checkpoint.save_strategy=no saves none. "
            "Set hub.hub_strategy=end, or checkpoint=recommended"
        )
    if hub.save_total_limit is not None and hub.save_total_limit < 1:
        yield f"hub.save_total_limit must be at least 1 (got {hub.save_total_limit}). To keep all: null"


_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    model_problems, data_problems, _eval_problems, background_problems, _early_stopping_problems, _precision_problems,
    _length_problems, _checkpoint_problems, _spike_problems,
    _hub_problems, secret_problems, tracker_problems, launch_problems, folder_problems, optimizer_problems,
    strategy_problems,
)  # fmt: skip
