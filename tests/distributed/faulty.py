"""An optimizer with faults, chosen by `optim.name`, so that a test can say what goes wrong at which step of which rank.

FAULTS is a JSON list of {"rank", "step" (counted from 1, in this process), "kind", "seconds"?, "once"?: a file that
marks the fault as done}. Kinds: sleep, kill (SIGKILL), raise, hang, quota (no file may grow beyond "bytes"; -1: any).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch


class FaultyAdamW(torch.optim.AdamW):
    """AdamW, bit for bit, that calls the faults first."""

    _num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self._num_steps += 1
        for fault in json.loads(os.environ.get("FAULTS", "[]")):
            if fault.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0)):
                self._maybe(fault)
        return super().step(closure)

    def _maybe(self, fault: dict[str, Any]) -> None:
        if fault.get("step", self._num_steps) != self._num_steps:
            return
        if fault.get("once"):
            if Path(fault["once"]).exists():
                return
            Path(fault["once"]).write_text("done")
        match fault["kind"]:
            case "sleep":
                time.sleep(fault["seconds"])
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("a fault that the test asked for")
            case "quota":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], hard))
            case "hang":
                time.sleep(3600)
