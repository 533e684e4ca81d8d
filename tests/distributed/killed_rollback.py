"""An optimizer under which a rollback is killed once, behind the part of it that KILL_BEHIND names.

supersede (later checkpoints renamed), update_run (kept in run.json), went_back (metrics.jsonl cut), noted (its line
written), load (state restored). KILLED is the file that says it was done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.checkpoint import resume
from launcher.train.recorder import MainRecorder
from launcher.train.spikes import Spikes
from tests.distributed.faulty import FaultyAdamW


def _killed_behind(function: Callable[..., Any], is_meant: Callable[..., bool]) -> Callable[..., Any]:
    def run(*arguments: Any, **fields: Any) -> Any:
        done = function(*arguments, **fields)
        if is_meant(*arguments, **fields):
            Path(os.environ["KILLED"]).write_text("done")
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return run


class KilledAdamW(FaultyAdamW):
    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        if Path(os.environ["KILLED"]).exists():
            return
        behind = os.environ["KILL_BEHIND"]
        owner, name = {"supersede": (resume, "supersede"), "load": (Spikes, "_leave_out")}.get(
            behind, (MainRecorder, behind)
        )
        meant: dict[str, Callable[..., bool]] = {
            "supersede": lambda *_, above_step: above_step >= 0,
            "update_run": lambda *_, **fields: "rollbacks" in fields and "state" not in fields and len(fields) == 1,
            "went_back": lambda *_: True,
            "noted": lambda _, line: "rolled_back_from" in line,
            "load": lambda spikes: bool(spikes._rollbacks),
        }
        setattr(owner, name, _killed_behind(getattr(owner, name), meant[behind]))
