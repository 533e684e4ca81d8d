"""Requests to stop: signals, the STOP file, the job's end. Only noted here; the loop acts at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from launcher.base import files

REASONS = ("signal", "stop_file", "preempted", "time_limit", "pruned")
"""In run.json as `reason` (pruned: as `state`); the STOP file's text."""
SUPERVISED = "LAUNCHER_SUPERVISED"
"""Set by `launcher train`, which removes a stale STOP file itself, before the ranks start."""
END_TIME = "LAUNCHER_JOB_END_TIME"
_MARGIN_S = 60.0


def read_stop(path: Path) -> str | None:
    """The reason that a STOP file gives; None where there is none. A folder, a link or a pipe of that name is none."""
    if not os.path.lexists(path):  # after nearly every step
        return None
    try:
        text = files.read_text(path, max_bytes=4096).strip()
    except (OSError, ValueError):
        return None
    return text if text in REASONS else "stop_file"


def remove_stop(path: Path) -> bool:
    """Removes a STOP file, or a link of that name (never what it leads to); False where something else stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def odd_stop(path: Path) -> str:
    return f"{path} is no file, so it asks for nothing: remove it. To stop this run: SIGTERM to `launcher train`"


def _ignore(number: int, frame: FrameType | None) -> None: ...


class StopRequests:
    """Collects the requests of this process. Signals once: the loop stops at the next step boundary."""

    def __init__(self, stop_file: Path, *, is_main: bool) -> None:
        self._stop_file, self._is_main = stop_file, is_main
        self.is_signalled = False
        """Whether a signal has come."""
        self._at_signal: Callable[[], None] | None = None
        self._pid = os.getpid()
        end = os.environ.get(END_TIME) or os.environ.get("SLURM_JOB_END_TIME")
        self._end_time = float(end) if end else None
        if is_main and not os.environ.get(SUPERVISED):
            self.clear()

    def install(self, at_signal: Callable[[], None] | None = None) -> None:
        """Obeys SIGTERM, SIGUSR1, SIGINT and SIGHUP; a second SIGINT ends the process at once.

        Args:
            at_signal: called in the handler, at the first signal.

        A SIGTERM that was ignored at start is not obeyed: our agent answers it for us, by a STOP file with the reason.
        So is a SIGHUP under nohup, and under our agent, to which a closed terminal is no reason to stop. A handler that
        does nothing, unlike SIG_IGN, is not inherited by programs that the user's code starts and ends.
        """
        self._at_signal, self._pid = at_signal, os.getpid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            may_be_shielded = number in (signal.SIGTERM, signal.SIGHUP)
            is_shielded = may_be_shielded and signal.getsignal(number) in (signal.SIG_IGN, _ignore)
            is_shielded |= number == signal.SIGHUP and bool(os.environ.get(SUPERVISED))
            signal.signal(number, _ignore if is_shielded else self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child that has not yet set its own
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        if self.is_signalled and number == signal.SIGINT:
            os._exit(130)
        is_first, self.is_signalled = not self.is_signalled, True
        if is_first and self._at_signal is not None:
            self._at_signal()

    @property
    def knows_end(self) -> bool:
        """Whether the job has an end that it knows of."""
        return self._end_time is not None

    def reason_code(self, save_s: float, step_s: float) -> int:
        """1 + the index in REASONS, or 0: nobody asked.

        Args:
            save_s, step_s: how long the last save and step took, to stop in time before the job's end.
        """
        if self._is_main:
            if (reason := read_stop(self._stop_file)) is not None:
                return 1 + REASONS.index(reason)
            if self._end_time is not None and time.time() > self._end_time - save_s - step_s - _MARGIN_S:
                return 1 + REASONS.index("time_limit")
        return 1 if self.is_signalled else 0

    def votes(self, save_s: float, step_s: float) -> tuple[int, int]:
        """What this process adds to an agreement: on the main one its `reason_code`; whether it was asked."""
        code = self.reason_code(save_s, step_s)
        return (code if self._is_main else 0), int(code > 0)

    def clear(self) -> None:
        """Removes the STOP file, where there is one: it was obeyed, or came too late. Only the main process does."""
        if self._is_main:
            remove_stop(self._stop_file)
