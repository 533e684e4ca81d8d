"""An optimizer with faults, chosen by `optim.name`: a test says what goes wrong at which step of which rank.

FAULTS is a JSON list of {"rank", "step" (counted from 1, in this process), "kind", "seconds"?, "bytes"?, "message"?,
"once"?: a file that marks the fault as done}. Kinds: sleep, wait (until "file" is there), kill (SIGKILL), raise, hang,
quota (no file may grow beyond "bytes"; -1: any), nan (in the gradients of that step, while its loss is a number),
out_of_memory (in a forward pass of that step and of later ones with more than "above" rows; in an evaluation instead
with "in_evaluation"; "signal" kills), jump (of the losses of that step and later ones, to three times as much),
no_links (from the start: no hard links can be made, and each file's copy to the spool takes so many seconds).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launcher.model import loss


def _faults() -> list[dict[str, Any]]:
    """Those of this rank."""
    rank = int(os.environ.get("RANK", 0))
    return [fault for fault in json.loads(os.environ.get("FAULTS", "[]")) if fault.get("rank", rank) == rank]


def _refuse_links(seconds: float) -> None:
    copy = shutil.copyfileobj

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def slowly(*arguments: Any) -> None:
        time.sleep(seconds)
        copy(*arguments)

    os.link, shutil.copyfileobj = refuse, slowly


class FaultyAdamW(torch.optim.AdamW):
    """AdamW, bit for bit, that calls the faults first; a second one, which is only tried out, is plain AdamW."""

    _num_steps = 0
    _is_made = False

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._is_plain, FaultyAdamW._is_made = FaultyAdamW._is_made, True
        if self._is_plain:
            return
        self.param_groups[0]["is_first"] = True
        for fault in _faults():
            if fault["kind"] == "no_links":
                _refuse_links(fault["seconds"])
        self._nans = [fault["step"] for fault in _faults() if fault["kind"] == "nan"]
        self._shortages = [fault for fault in _faults() if fault["kind"] == "out_of_memory"]
        self._jumps = [fault["step"] for fault in _faults() if fault["kind"] == "jump"]
        if self._nans or self._shortages or self._jumps:
            self._summed_loss = loss.summed_loss
            loss.summed_loss = self._spoiled  # `build_loss` takes it from there, and is called later

    def _spoiled(self, model: Any, batch: Any, **settings: Any) -> loss.Losses:
        borders = batch.get("cu_seq_lens_q")  # of rows one after another
        num_rows = len(batch["input_ids"]) if borders is None else len(borders) - 1
        for fault in self._shortages:
            is_asked = fault.get("in_evaluation", False) is not torch.is_grad_enabled()
            if is_asked and self._num_steps + 1 >= fault["step"] and num_rows > fault["above"]:
                if fault.get("signal"):
                    os.kill(os.getpid(), signal.SIGKILL)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        found = self._summed_loss(model, batch, **settings)
        if self._jumps and self._num_steps + 1 >= min(self._jumps):
            return found._replace(loss_sum=found.loss_sum * 3)
        if self._num_steps + 1 in self._nans:
            self._nans.remove(self._num_steps + 1)
            spoiled = found.loss_sum + torch.sqrt(found.loss_sum * 0)  # 0, with the derivative inf · 0
            return found._replace(loss_sum=spoiled)
        return found

    def step(self, closure: Any = None) -> Any:
        is_whole = any(group.get("is_first") and group["params"] for group in self.param_groups)
        if is_whole and not self._is_plain:  # DeepSpeed steps each group alone
            self._num_steps += 1
            sys.audit("tests.step", self._num_steps)
            for fault in _faults():
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
            case "wait":
                while not Path(fault["file"]).exists():
                    time.sleep(0.01)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError(fault.get("message", "a fault that the test asked for"))
            case "quota":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], hard))
            case "hang":
                time.sleep(3600)
