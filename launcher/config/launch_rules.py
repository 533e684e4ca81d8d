"""The rules of where and how a run is launched: processes, machines, Slurm, folders; and no secret."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.base.paths import checkpoint_step
from launcher.base.secrets import is_secret, refusal
from launcher.config import sbatch
from launcher.config.settings import RunConfig, is_local_path, to_dict


def secret_problems(config: RunConfig) -> Iterator[str]:
    environment = tuple(os.environ.items())
    for key, value in leaves(to_dict(config)):
        if _is_secret_beside(environment, key, value):
            yield refusal(key)


@functools.lru_cache(maxsize=4096, typed=True)
def _is_secret_beside(environment: tuple[tuple[str, str], ...], key: str, value: Any) -> bool:
    """Remembered: the configs of a sweep's thousand jobs differ in a few values. Secrets of the environment count."""
    return is_secret(key, value)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{key}[{i}]")
    else:
        yield key, value


def launch_problems(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    if config.strategy.name == "single" and (launch.num_processes or 1) > 1:
        yield (
            f"strategy=single runs one process but launch.num_processes={launch.num_processes}. "
            "Set strategy=ddp, or launch.num_processes=1"
        )
    if launch.num_processes and launch.num_processes % launch.num_machines:
        yield (
            f"launch.num_processes={launch.num_processes} is the total over all machines and must be a multiple of "
            f"launch.num_machines={launch.num_machines}. Set launch.num_processes={launch.num_machines}, for example"
        )
    if launch.machine_rank >= launch.num_machines:
        yield (
            f"launch.machine_rank={launch.machine_rank} must be below launch.num_machines={launch.num_machines}: "
            "the first machine is 0"
        )
    if launch.main_process_port is not None and launch.main_process_port > 65535:
        yield (
            f"launch.main_process_port must be at most 65535 (got {launch.main_process_port}). "
            "For a free one: launch.main_process_port=null"
        )
    for name, text in launch.env.items():
        if not isinstance(text, str):
            yield f"launch.env.{name} must be text (got {text!r}). For an empty one: launch.env.{name}=\"''\""
        elif re.fullmatch(r"\$(\w+|\{\w+\})", text) and is_secret(f"launch.env.{name}", "x" * 20):
            yield (
                f"launch.env.{name}={text} is not expanded: the run would get these very characters. Variables of your "
                f"shell reach it by themselves: leave launch.env.{name} out"
            )
    yield from _sbatch_problems(launch.sbatch)


def _sbatch_problems(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)):
            yield f"launch.sbatch.{key} must be one value or a list of them (got {value!r})"
        elif key.replace("_", "-") in ("time", "time-min") and value is not None and not sbatch.is_time(value):
            yield _time_problem(key, value)


def _time_problem(key: str, value: Any) -> str:
    example = f"launch.sbatch.{key}=\"'12:00:00'\""
    if type(value) is int:
        return (
            f"launch.sbatch.{key}={value} is a number: YAML reads 12:00:00 as 43200. Quote it in the file: "
            f"{key}: '12:00:00'; or {example} on the command line; for {value} minutes: launch.sbatch.{key}={value}"
        )
    return (
        f"launch.sbatch.{key} must be a time as Slurm writes it (got {value!r}): MINUTES, MINUTES:SECONDS, "
        f"HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES:SECONDS, UNLIMITED. Example: {example}"
    )


def folder_problems(config: RunConfig) -> Iterator[str]:
    if not config.output_dir.strip():
        yield (
            "output_dir is empty (an unset variable of the shell?): the run would be strewn over this folder. "
            f"Set output_dir=outputs/{config.run_name or 'run'}"
        )
        return
    cure = f"Set another output_dir=outputs/{config.run_name or 'run'}"
    try:
        own = Path(config.output_dir).expanduser().resolve()
        existing = next(folder for folder in (own, *own.parents) if folder.exists())
        for part in own.relative_to(existing).parts:
            (existing / part).exists()  # which it does not: only whether it may be called so
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, an unknown ~user
        yield f"output_dir={config.output_dir} cannot be used: {error}. {cure}"
        return
    for key in ("model_name_or_path", "adapter_name_or_path"):
        name = getattr(config.model, key, None)
        if not name or not is_local_path(name):
            continue
        folder = Path(name).expanduser().resolve()
        if folder == own or (own.exists() and folder.exists() and own.samefile(folder)):
            yield f"output_dir={config.output_dir} is the folder of model.{key}, which the run would overwrite. {cure}"
        elif folder.parent == own and checkpoint_step(folder) is not None:
            yield (
                f"model.{key}={name} is a checkpoint of output_dir={config.output_dir}: this run would go on from it "
                f"or delete it. To go on from it: checkpoint.resume_from_checkpoint={name}. To start from its weights: "
                f"another output_dir=outputs/{config.run_name or 'run'}"
            )
    if not existing.is_dir():
        where = "is a file" if existing == own else f"lies below {existing}, which is a file"
        yield f"output_dir={config.output_dir} {where}: a run needs a folder. {cure}"
    if checkpoint_step(own) is not None and not (own / "config.json").is_file():
        yield f"output_dir={config.output_dir} has the name of a checkpoint, which another run may take it for. {cure}"
    for folder in (own, *own.parents):
        if checkpoint_step(folder) is not None and (folder / "config.json").is_file():
            yield f"output_dir={config.output_dir} lies in the checkpoint {folder}, which may be deleted. {cure}"
