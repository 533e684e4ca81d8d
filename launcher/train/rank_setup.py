"""The frame around a rank: quiet libraries, its log, dying with its agent, and how its failure is told."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launcher.base import files
from launcher.base.devices import device_problems, precision_problems, spare_device_problems
from launcher.base.end_report import write_end_report
from launcher.base.environment import clean_rank, drop_engine_settings, interface_problems, other_engines
from launcher.base.errors import ConfigError, UserError
from launcher.base.output import open_standard_files, survive_closed_output
from launcher.base.process import RESTARTED, die_with_parent, host
from launcher.base.rank_reports import ATTEMPT, Report, make_report, write_report
from launcher.base.stop_requests import SUPERVISED
from launcher.base.timeline import Timeline, began_at
from launcher.config.rules import cache_problems
from launcher.hub.environment import distrust_xet

if TYPE_CHECKING:
    from launcher.base.lock import RunLock
    from launcher.base.paths import RunPaths
    from launcher.base.processes import Processes
    from launcher.config.settings import RunConfig
    from launcher.saving.training_state import TrainingState
    from launcher.train.early_stop import EarlyStop
    from launcher.train.recorder import Recorder

_recorder: Recorder | None = None
_notices: list[str] = []
_state: TrainingState | None = None
_paths: RunPaths | None = None
_lock: RunLock | None = None
_early: EarlyStop | None = None


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def before_imports() -> None:
    """Before torch and its friends are imported: they read the environment then."""
    if os.environ.get(SUPERVISED) and os.getppid() == 1:
        os._exit(1)  # the agent was killed while this interpreter started: nobody will ever end this process
    die_with_parent(os.getppid())
    open_standard_files()
    survive_closed_output()
    _notices.extend(clean_rank(os.environ))
    quiet_libraries()


def quiet_libraries() -> None:
    """What they read, and would say, as they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    distrust_xet()
    if not os.environ.get("LAUNCHER_DEBUG"):
        warnings.simplefilter("ignore")
        for library in ("DeepSpeed", "bitsandbytes"):
            logging.getLogger(library).setLevel(logging.ERROR)
        os.environ.setdefault("DS_LOG_LEVEL", "error")


def check_agent(config: RunConfig, argv: Sequence[str]) -> None:
    """Under one's own `accelerate launch` the flags must not contradict the settings; the process number is its own.

    Raises:
        ConfigError: a process number, strategy or precision set there differs; the cache cannot be written.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    problems = [*cache_problems(config), *device_problems(num_local), *precision_problems(config.model.dtype)]
    if config.eval.in_background and rank() == 0:
        problems += spare_device_problems(config.eval.background_device, num_local)
    wanted = config.launch.num_processes
    is_given = any(argument.lstrip("+").startswith("launch.num_processes=") for argument in argv)
    if is_given and wanted is not None and wanted != world:
        problems.append(
            f"launch.num_processes={wanted} but accelerate launch started {world}. "
            f"Start it with --num_processes {wanted}, or set launch.num_processes={world}"
        )
    if config.strategy.name == "single" and world > 1:
        problems.append(f"strategy=single runs one process but accelerate launch started {world}. Set strategy=ddp")
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if uses_deepspeed and stage and int(stage) != config.strategy.zero_stage:
        problems.append(
            f"accelerate launch was given --zero_stage {stage} but strategy={config.strategy.name}. "
            f"Leave --zero_stage and --use_deepspeed out, or set strategy=zero{stage}"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        problems.append(
            f"accelerate launch was given --mixed_precision {precision} but the config means {config.mixed_precision}. "
            "Leave it out, or set model.dtype"
        )
    for name in other_engines(os.environ):
        problems.append(
            f"{name}={os.environ[name]}: accelerate launch was told to use another engine than strategy="
            f"{config.strategy.name}. Leave it out; ZeRO is chosen by strategy=zero1|zero2|zero3"
        )
    if world > 1:
        problems += interface_problems(os.environ)
    if problems:
        raise ConfigError(problems)
    drop_engine_settings(os.environ)
    for notice in _notices if rank() == 0 else []:
        print(f"launcher: {notice}", file=sys.stderr, flush=True)


def opened(paths: RunPaths, lock: RunLock, processes: Processes, early: EarlyStop) -> None:
    """output_dir is ours: what the libraries print on the other processes goes to logs/rank-N.log."""
    global _paths, _lock, _early
    _paths, _lock, _early = paths, lock, early
    lock.on_lost = fail
    if processes.is_main:
        Timeline(paths).append(
            "start", began=round(began_at(), 3), attempt=os.environ.get(ATTEMPT), host=host(),
            job_id=os.environ.get("SLURM_JOB_ID"), num_processes=processes.world_size,
            is_restart=bool(os.environ.get(RESTARTED)) or None, requeues=os.environ.get("SLURM_RESTART_COUNT"),
        )  # fmt: skip
    terminal = os.environ.get("LAUNCHER_STDERR")
    if processes.is_main and terminal:  # the agent's own output goes to logs/agent.log
        try:
            fd = os.open(terminal, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # a pipe that nobody reads: at once
            os.set_blocking(fd, True)
        except OSError:
            return
        os.dup2(fd, 2)
        os.close(fd)
    if not processes.is_main and not os.environ.get("LAUNCHER_DEBUG"):
        with files.open_append(paths.rank_log(processes.rank), within=paths.root) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def training_began(recorder: Recorder, state: TrainingState) -> None:
    """From here on a failure is written into run.json, with the step that was reached."""
    global _recorder, _state
    _recorder, _state = recorder, state
    if _early is not None:
        _early.end()


def fail(error: BaseException) -> NoReturn:
    """Tells what happened and ends the process at once, so that the agent ends the others.

    What is left: logs/error-rank-N.json (the agents show the earliest), run.json with the step that was reached.
    """
    if isinstance(error, SystemExit) and error.code in (0, None):
        if _lock is not None:
            _lock.release()
        os._exit(0)
    if _early is not None and _early.is_asked and not isinstance(error, UserError):
        _early.leave("signal")  # another rank has obeyed it, and is missed in a collective
    step = _state.progress.step if _state is not None else None
    report = make_report(error, rank=rank(), training_began=_state is not None, step=step)
    _write_report(report)
    if _recorder is not None and _state is not None:
        _recorder.close()
        if _lock is None or _lock.is_held():  # else run.json is another run's
            _recorder.update_run(
                state="failed", reason=None if report["is_ours"] else "crash", exit_code=report["exit_code"],
                error=report["message"], step=_state.progress.step, epoch=_state.progress.epoch,
            )  # fmt: skip
    elif rank() == 0 and _paths is not None and _lock is not None and _lock.is_held():
        Timeline(_paths).append("end", state="failed", reason=None if report["is_ours"] else "crash")
    if not os.environ.get(SUPERVISED):
        text = report["message"] if report["is_ours"] else "\n".join(report["traceback"])
        if rank() == 0 or not report["is_ours"]:
            print(f"launcher: rank {rank()}: {text}", file=sys.stderr, flush=True)
    if _lock is not None:
        was_held = _lock.is_held()
        _lock.release()
        if was_held and _paths is not None and rank() == 0 and not os.environ.get(SUPERVISED):
            write_end_report(_paths.root)
    os._exit(report["exit_code"])


def maybe_report(paths: RunPaths, processes: Processes) -> None:
    """report.html, where nobody above does it: under one's own accelerate launch."""
    if processes.is_main and not os.environ.get(SUPERVISED):
        write_end_report(paths.root)


def _write_report(report: Report) -> None:
    folder = Path(os.environ["LAUNCHER_ERROR_DIR"]) if os.environ.get("LAUNCHER_ERROR_DIR") else None
    for target in (folder, _paths.logs_dir if _paths is not None else None):
        if target is not None and target.is_dir():
            with contextlib.suppress(OSError):
                write_report(report, target)
