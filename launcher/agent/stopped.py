"""Ranks that a signal has stopped (SIGSTOP, Ctrl-Z): no watchdog inside of them can run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_S = 5.0
_LOOK_AFTER_STOP_S = 1.0
_SAY_S = 4.0
_SAY_AGAIN_S = 60.0
_RECENT_S = 15.0
"""torchrun ends a stopped rank some seconds after the others have given up waiting for it."""


class StoppedProcesses:
    """Looks at the processes below the agent's `accelerate launch`, says which are stopped, and since when."""

    def __init__(self, root: int, limit_s: float, first_rank: int = 0) -> None:
        """
        Args:
            root: the pid of `accelerate launch`.
            limit_s: launch.hang_timeout_s.
            first_rank: of this machine.
        """
        self._root, self._limit_s, self._first_rank = root, limit_s, first_rank
        self._since: dict[int, float] = {}
        self._say_at: dict[int, float] = {}
        self._look_at = 0.0
        self._last: dict[int, tuple[int, float]] = {}

    def look(self, is_stop_asked: Callable[[], bool]) -> bool:
        """To be called often. A request to stop the run wakes what is stopped: it could not save otherwise.

        Returns:
            Whether a rank has been stopped for longer than the limit.
        """
        now = time.monotonic()
        if now < self._look_at:
            return False
        is_stopping = is_stop_asked()
        self._look_at = now + (_LOOK_AFTER_STOP_S if is_stopping else _LOOK_S)
        table = _processes()
        stopped = [pid for pid in _descendants(table, self._root) if table[pid][0] == "T"]
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        ranks = {pid: rank for pid in stopped if (rank := self._rank(pid, table)) is not None}
        self._tell(stopped, ranks, now, is_stopping=is_stopping)
        stood_s = {pid: now - self._since[pid] for pid in ranks}
        is_long = min(_SAY_S, self._limit_s)
        self._last |= {ranks[pid]: (pid, now) for pid, seconds in stood_s.items() if seconds >= is_long}
        return any(seconds > self._limit_s for seconds in stood_s.values()) and not is_stopping

    def _rank(self, pid: int, table: dict[int, tuple[str, int]]) -> int | None:
        if table[pid][1] == self._root and _argv(pid) == _argv(self._root):  # a fork that is to become one, in turn
            return self._first_rank + sorted(_children(table).get(self._root, [])).index(pid)
        return _rank(pid, table)

    def _tell(self, stopped: list[int], ranks: dict[int, int], now: float, *, is_stopping: bool) -> None:
        for pid in stopped:
            name = f"rank {ranks[pid]}" if pid in ranks else f"a process of the run ({_words(pid)})"
            if is_stopping:
                text = f"launcher: {name} (pid {pid}) is stopped by a signal: it is let go on, to end with a save"
                print(text, file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
            elif now - self._since[pid] >= _SAY_S and now >= self._say_at.get(pid, 0.0):
                self._say_at[pid] = now + _SAY_AGAIN_S
                print(
                    f"launcher: {name} (pid {pid}) is stopped by a signal (SIGSTOP, Ctrl-Z) and does "
                    f"nothing. To let it go on: kill -CONT {pid}", file=sys.stderr, flush=True,
                )  # fmt: skip

    def at_the_end(self) -> dict[int, int]:
        """Ranks that stood still until now, and their pids."""
        return {rank: pid for rank, (pid, seen) in self._last.items() if time.monotonic() - seen < _RECENT_S}


def _processes() -> dict[int, tuple[str, int]]:
    """State and parent of every process that can be seen."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - hundreds of names, every second
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                found[int(name)] = fields[0].decode(), int(fields[1])
    return found


def _descendants(table: dict[int, tuple[str, int]], root: int) -> list[int]:
    children = _children(table)
    found, pending = [], [root]
    while pending:
        inner = children.get(pending.pop(), [])
        found += inner
        pending += inner
    return found


def _children(table: dict[int, tuple[str, int]]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for pid, (_, parent) in table.items():
        children.setdefault(parent, []).append(pid)
    return children


def _rank(pid: int, table: dict[int, tuple[str, int]]) -> int | None:
    """Of a process that trains; None for the others, a rank's own children among them."""
    if not _trains(pid) or _trains(table[pid][1]):
        return None
    with contextlib.suppress(OSError, ValueError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), 0)
    return None


def _trains(pid: int) -> bool:
    """`python … -m launcher.train`; `accelerate launch` names that module too, after its own."""
    words = _argv(pid)
    return b"-m" in words and words[words.index(b"-m") + 1 :][:1] == [b"launcher.train"]


def _argv(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def _words(pid: int) -> str:
    """What is run, without arguments that could hold something private."""
    words = [word.decode(errors="replace") for word in _argv(pid)]
    return words[2] if words[1:2] == ["-m"] else Path(words[0]).name if words else "?"
