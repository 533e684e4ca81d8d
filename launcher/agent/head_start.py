"""`accelerate launch` begins while the settings are still being composed: with imports that depend on none of them."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from launcher.base.collector import no_collections
from launcher.base.forks import Fork, close_inherited, may_fork

MODULE = "launcher.train.accelerate_launch"
_SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm and container runtimes signal all processes of a job. torchrun would end the ranks; the agent asks them by the
STOP file, with the reason. torchrun itself is told to handle SIGHUP alone, or it would not ignore these any more."""
_LIBRARIES = ("asyncio", "unittest.mock", "multiprocessing.connection", "sympy", "tokenizers", "safetensors", "jinja2")
"""Of what torch and transformers import, that which takes long and loads neither of them, nor numpy: those look at
OMP_NUM_THREADS, which follows from the settings."""


def head_start() -> Fork | None:
    """A fork of this process, which has imported little yet; None where there can be none."""
    if _has_flags_of_its_own() or {"numpy", "torch"} & set(sys.modules) or not may_fork():
        return None
    try:
        return Fork(MODULE, meanwhile=_import_libraries)
    except OSError:  # no memory for two, or no process more: the command is started when it is known
        return None


def _has_flags_of_its_own() -> bool:
    """Of this interpreter alone (`python -P`), which a command would not get as it gets variables."""
    flags = sys.flags
    is_safe_by_flag = flags.safe_path and not os.environ.get("PYTHONSAFEPATH")
    return bool(flags.optimize or flags.isolated or flags.ignore_environment or is_safe_by_flag)


def shield() -> None:
    """From the signals that a terminal or a cluster sends to all processes."""
    for number in _SHIELDED:
        signal.signal(number, signal.SIG_IGN)


def _import_libraries() -> None:
    os.setsid()  # Ctrl-C reaches only the agent
    shield()
    close_inherited()
    with no_collections():
        for name in _LIBRARIES:
            try:
                importlib.import_module(name)
            except Exception:  # who needs it will say so
                continue
