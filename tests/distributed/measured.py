"""An optimizer that measures the memory of its run, chosen by `optim.name`; its process must run under `allocations.c`.

Into MEASURED_DIR, one file for each rank, a line per step: {"bytes", "peak"}: what is allocated after the step and at
most since the step before, beyond what the process held when there was nothing of the run but its model's parameters
(those included).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from launcher.train import planned


def _parameter_bytes() -> int:
    """Of all parameters that are there, frozen ones too: the optimizer is given those that are trained."""
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.nn.Parameter)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


class MeasuredAdamW(torch.optim.AdamW):
    """AdamW, bit for bit; a second one, which is only tried out, measures nothing."""

    _is_made = False

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        if MeasuredAdamW._is_made:
            return
        MeasuredAdamW._is_made = True
        self.param_groups[0]["is_first"] = True
        self._library = ctypes.CDLL(None)
        self._library.counted_bytes.restype = self._library.counted_peak.restype = ctypes.c_long
        self._base = self._library.counted_bytes() - _parameter_bytes()
        self._path = Path(os.environ["MEASURED_DIR"]) / f"rank-{os.environ.get('RANK', 0)}.jsonl"

    def step(self, closure: Any = None) -> Any:
        if any(group.get("is_first") and group["params"] for group in self.param_groups):  # DeepSpeed steps each alone
            self._tell()
        return super().step(closure)

    def _tell(self) -> None:
        now, peak = self._library.counted_bytes() - self._base, self._library.counted_peak() - self._base
        with self._path.open("a") as file:
            file.write(json.dumps({"bytes": now, "peak": peak}) + "\n")
        self._library.counted_reset()


class ToldAdamW(torch.optim.AdamW):
    """Of a run that tells how far its plan was from the truth however short it was."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        planned.WORTH_IT_S, planned.LEAST_SHARE = 0.0, float(os.environ.get("LEAST_SHARE", 0.0))
