"""A metric for evaluations in the background that goes as planned: slow, failing, killed, standing still."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.data import EvalContext


class Planned:
    """Each call does the next thing of `plan`, over all processes that ever call it; after the last, nothing odd.

    Args:
        plan: `ok`, `raise`, `secret` (raise with $PGPASSWORD), `kill`, `stop` (SIGSTOP), or seconds to sleep.
    """

    def __init__(self, calls: str, plan: Sequence[str | float] = ()) -> None:
        self._calls, self._plan = Path(calls), plan

    def __call__(self, context: EvalContext) -> dict[str, float]:
        with self._calls.open("ab") as file:
            file.write(b".")
            number = file.tell() - 1
        action = self._plan[number] if number < len(self._plan) else "ok"
        if action == "raise":
            raise RuntimeError("as planned")
        if action == "secret":
            raise RuntimeError(f"no access with {os.environ['PGPASSWORD']}")
        if action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        elif action != "ok":
            time.sleep(float(action))
        return {"rows": context.sum_over_processes([1.0])[0]}
