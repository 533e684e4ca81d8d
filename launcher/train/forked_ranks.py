"""Ranks that are forks of one process which has imported everything, instead of N interpreters that each do.

Importing torch and transformers takes two seconds on a fast disk, and much longer where N processes read the same
thousands of files from a network. So they are imported once. The forks wait; torch's agent starts a rank by a command
and an environment, and is given the fork that becomes just that.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.base.forks import Fork, arguments_behind, may_fork

_MODULE = "launcher.train"
_LIBRARIES = (
    "accelerate.utils", "transformers.modeling_utils", "launcher.agent.out_of_memory", "launcher.train.sizing",
    "launcher.train.accelerator", "launcher.train.build", "launcher.train.early_stop", "launcher.train.finish",
    "launcher.train.loop",
)  # fmt: skip
"""What `launcher.train.__main__` imports."""
_GPU_DRIVER = Path("/dev/nvidiactl")


def _imports_open_devices() -> bool:
    """transformers asks for a GPU as it is imported, if only flash-attn is installed."""
    packages = ("flash_attn", "flash_attn_interface")
    return _GPU_DRIVER.exists() and any(importlib.util.find_spec(name) is not None for name in packages)


class ForkedRanks:
    def __init__(self) -> None:
        self._waiting: list[Fork] = []
        self._has_libraries = False

    def import_libraries(self) -> None:
        """What fails here fails in the ranks too, which tell it in a report of their own."""
        if not may_fork() or _imports_open_devices():
            return
        with contextlib.suppress(Exception):
            for name in _LIBRARIES:
                importlib.import_module(name)
            self._has_libraries = True

    def fork(self, count: int) -> None:
        if not self._has_libraries or not may_fork():
            return
        with contextlib.suppress(OSError):  # no memory, or no process more: the others are started as commands
            for _ in range(count):
                self._waiting.append(Fork(_MODULE, close=[rank.order_fd for rank in self._waiting]))

    def begin_in_place_of_popen(self, launch: types.ModuleType) -> None:
        """Where torch's agent, or `launch` of Accelerate for a single process, starts a rank."""
        if not self._waiting:
            return
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        if hasattr(subprocess_handler, "Popen") and hasattr(launch, "subprocess"):
            subprocess_handler.Popen = self.popen  # type: ignore[misc, assignment]
            launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": self.popen})  # type: ignore[attr-defined]

    def popen(
        self, args: Sequence[str], env: Mapping[str, str], stdout: Any = None, stderr: Any = None,
        start_new_session: bool = False,
    ) -> Fork | subprocess.Popen[bytes]:  # fmt: skip
        """subprocess.Popen, for a rank's command."""
        is_rank = stdout is None and stderr is None and arguments_behind(_MODULE, args) is not None
        while is_rank and self._waiting:
            rank = self._waiting.pop(0)
            if rank.begin(args, env, start_new_session):
                return rank
            rank.end()
        return subprocess.Popen(args, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session)
