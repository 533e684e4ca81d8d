"""A request to stop before the first step: nothing is lost, so the run ends at once."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

from launcher.base import files
from launcher.base.errors import EXIT_STOPPED, StopAskedError
from launcher.base.lock import RunLock
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.base.stop_requests import REASONS, StopRequests, read_stop
from launcher.config.settings import RunConfig
from launcher.data import Data, TokenisingDisplay, build_data
from launcher.train.metrics import RunFile

_POLL_S = 0.2
_KEPT = ("step", "epoch", "total_steps", "length", "about", "hub", "best_metric", "best_step")
"""Of the run.json of an earlier start."""


class EarlyStop:
    """From the first look into output_dir to the first step. A rank's own signals end it, wherever it stands.

    The main process writes run.json and ends; the others have nothing to write. They end once run.json says so, or
    when a collective fails since the main process has gone (`is_asked`): one that alone got the signal goes on.
    """

    def __init__(self, paths: RunPaths, processes: Processes, lock: RunLock) -> None:
        self._paths, self._processes, self._lock = paths, processes, lock
        self.stop = StopRequests(paths.stop_file, is_main=processes.is_main)
        self._before = self._state()
        self._is_over = False
        self.stop.install(self._on_signal)

    def end(self) -> None:
        """Training begins: from here on the loop looks for requests."""
        self._is_over = True

    @property
    def is_asked(self) -> bool:
        """Whether this process got a signal, so that a failure before the first step is part of stopping."""
        return not self._is_over and self.stop.is_signalled

    def _on_signal(self) -> None:
        if self._is_over:
            return
        if self._processes.is_main:
            self.leave("signal")
        threading.Thread(target=self._follow_main, daemon=True).start()

    def _follow_main(self) -> None:
        while not self._is_over:
            now = self._state()
            if now != self._before and now.get("state") in ("interrupted", "pruned"):
                os._exit(0)
            time.sleep(_POLL_S)

    def _state(self) -> dict[str, Any]:
        value = files.read_json_or(self._paths.run_state, {})
        return value if isinstance(value, dict) else {}

    def leave(self, reason: str) -> NoReturn:
        """Ends this process with 0; the main one writes down why. Not collective."""
        if self._processes.is_main and self._lock.is_held():
            if self._before.get("state") != "finished":  # another start of it: it stays finished
                self._write_state(reason)
            self.stop.clear()
            text = "launcher: stopped before the first step; run the same command again to continue\n"
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), text.encode())  # we may have interrupted a print
            self._lock.release()
        os._exit(0)

    def _write_state(self, reason: str) -> None:
        kept = {key: self._before[key] for key in _KEPT if key in self._before}
        RunFile(self._paths, self._processes.world_size).update(
            **kept, state="pruned" if reason == "pruned" else "interrupted",
            reason=None if reason == "pruned" else reason, exit_code=EXIT_STOPPED,
        )  # fmt: skip

    def build_data(self, config: RunConfig, tokenizer: Any) -> Data:
        """The data, tokenised where it has to be; a STOP file is obeyed meanwhile, by all processes. Collective.

        Raises:
            DataError, ConfigError: as `launcher.data.build_data`.
        """
        processes, asked = self._processes, ""

        def alive() -> None:
            nonlocal asked
            code = self.stop.reason_code(0.0, 0.0)
            asked = read_stop(self._paths.stop_file) or (REASONS[code - 1] if code else "")
            if asked:
                raise StopAskedError(asked)

        def wait() -> None:
            if reasons := [reason for reason in processes.gather(asked) if reason]:
                raise StopAskedError(reasons[0])

        display = TokenisingDisplay(is_shown=processes.is_main, alive=alive)
        try:
            return build_data(config, tokenizer, is_builder=processes.is_local_main, wait=wait, display=display)
        except StopAskedError as error:
            self.leave(str(error))
