"""The frame around a rank: quiet libraries, its log, dying with its agent, and how its failure is told."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.base import files
from launcher.base.errors import EXIT_FAILED, ConfigError, LauncherError
from launcher.base.process import die_with_parent, host
from launcher.base.secrets import redacted
from launcher.config.rules import cache_problems
from launcher.hub.environment import distrust_xet

if TYPE_CHECKING:
    from launcher.base.lock import RunLock
    from launcher.base.paths import RunPaths
    from launcher.base.processes import Processes
    from launcher.config.settings import RunConfig
    from launcher.train.recorder import Recorder

ATTEMPT = "LAUNCHER_ATTEMPT"
_recorder: Recorder | None = None
_paths: RunPaths | None = None
_lock: RunLock | None = None


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def before_imports() -> None:
    """Before torch and its friends are imported: they read the environment then."""
    die_with_parent(os.getppid())
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
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        os.environ.setdefault("DS_LOG_LEVEL", "error")


def check_agent(config: RunConfig, argv: Sequence[str]) -> None:
    """Under one's own `accelerate launch` the flags must not contradict the settings; the process number is its own.

    Raises:
        ConfigError: a process number, strategy or precision set there differs; the cache cannot be written.
    """
    problems = list(cache_problems(config))
    world = int(os.environ.get("WORLD_SIZE", 1))
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
    if problems:
        raise ConfigError(problems)


def opened(paths: RunPaths, lock: RunLock, processes: Processes) -> None:
    """output_dir is ours: what the libraries print on the other processes goes to logs/rank-N.log."""
    global _paths, _lock
    _paths, _lock = paths, lock
    terminal = os.environ.get("LAUNCHER_STDERR")
    if processes.is_main and terminal:  # the agent's own output goes to logs/agent.log
        try:
            fd = os.open(terminal, os.O_WRONLY | os.O_APPEND)
        except OSError:
            return
        os.dup2(fd, 2)
        os.close(fd)
    if not processes.is_main and not os.environ.get("LAUNCHER_DEBUG"):
        with files.open_append(paths.rank_log(processes.rank), within=paths.root) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def training_began(recorder: Recorder) -> None:
    """From here on a failure is written into run.json."""
    global _recorder
    _recorder = recorder


def fail(error: BaseException) -> NoReturn:
    """Tells what happened and ends the process at once, so that the agent ends the others.

    What is left: logs/error-rank-N.json (read by `launcher train`, which shows the earliest), run.json.
    """
    if isinstance(error, SystemExit) and error.code in (0, None):
        os._exit(0)
    is_ours = isinstance(error, LauncherError)
    code = error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED
    report = {
        "rank": rank(), "host": host(), "time": time.time(), "attempt": os.environ.get(ATTEMPT), "exit_code": code,
        "kind": type(error).__name__, "is_ours": is_ours, "message": redacted(str(error)) or type(error).__name__,
        "training_began": _recorder is not None,
        "traceback": redacted("".join(traceback.format_exception(error))),
    }  # fmt: skip
    _write_report(report)
    if _recorder is not None:
        _recorder.close()
        _recorder.update_run(
            state="failed", reason=None if is_ours else "crash", exit_code=code, error=report["message"]
        )
    if not os.environ.get("LAUNCHER_SUPERVISED"):
        text = report["message"] if is_ours else report["traceback"]
        if rank() == 0 or not is_ours:
            print(f"launcher: rank {rank()}: {text}", file=sys.stderr, flush=True)
    if _lock is not None:
        _lock.release()
    os._exit(code)


def _write_report(report: dict[str, Any]) -> None:
    folder = Path(os.environ["LAUNCHER_ERROR_DIR"]) if os.environ.get("LAUNCHER_ERROR_DIR") else None
    for target in (folder, _paths.logs_dir if _paths is not None else None):
        if target is not None and target.is_dir():
            try:
                files.replace_file(target / f"error-rank-{report['rank']}.json", json.dumps(report, indent=1).encode())
            except OSError:
                continue
