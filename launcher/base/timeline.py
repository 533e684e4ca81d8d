"""logs/timeline.jsonl: what a run's time was spent on, from its first start on. Standard library only.

Append only; each line is a JSON object with `event` and `t`, its time in seconds since the epoch:

| event | written by | says |
|---|---|---|
| queued | submit | it waits for Slurm from here on: job_id |
| start | main process | output_dir is held: began (of the command that started it), attempt, job_id, host |
| undone | main process | lines of metrics.jsonl that a resume removed: losses [[step, loss]], the last of them |
| rollback | main process | it went back to a checkpoint, without a new start: step of it |
| begin | main process | the loop begins: step that it goes on from, total_steps |
| progress | main process | step that is done; evaluation_s, save_s: what went into those since the line before |
| evaluation, save | main process | one that lasted: s, its seconds, up to t |
| end | main process | state and reason as in run.json |
| closed | main process | its last act |
| ended | agent | the processes of an attempt are gone: attempt, began, state, reason, text |

A crash may cut the last line off; readers leave out what is no JSON. No writing ever raises: a full disk ends no run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.base import json_lines
from launcher.base.paths import RunPaths
from launcher.base.secrets import redacted

BEGAN = "LAUNCHER_BEGAN"
"""Environment: when the command that started the ranks began, seconds since the epoch."""
MAX_BYTES = 16 * 2**20
"""Of progress; starts and ends may make the file a quarter longer. At a line a minute that is half a year."""
_MAX_TEXT = 500


class Timeline:
    """The file of one run, for those who write it."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def append(self, event: str, **fields: Any) -> None:
        """Adds a line; `t` is now unless it is given."""
        line = {"t": round(time.time(), 3), "event": event, **{k: v for k, v in fields.items() if v is not None}}
        limit = MAX_BYTES if event in ("progress", "evaluation", "save", "undone") else MAX_BYTES * 5 // 4
        text = (json.dumps(line) + "\n").encode()
        with contextlib.suppress(OSError):
            json_lines.append(self._paths.timeline, text, within=self._paths.root, max_bytes=limit)

    def started_at(self) -> float | None:
        """When the first line was written; None where there is none."""
        return next((line["t"] for line in read_timeline(self._paths)), None)


def note_ended(paths: RunPaths, attempt: str, began: float, outcome: Mapping[str, Any]) -> None:
    """For who watches the ranks: all of them are gone. `outcome`: state, reason, text."""
    try:
        if not paths.logs_dir.is_dir():
            return
    except OSError:  # the disk has failed
        return
    text = redacted(str(outcome.get("text") or "").strip().partition("\n")[0])[:_MAX_TEXT]
    state, reason = outcome.get("state"), outcome.get("reason")
    Timeline(paths).append(
        "ended", attempt=attempt, began=round(began, 3), state=state, reason=reason, text=text or None
    )


def began_at() -> float:
    """When what started this process began: the command before it where that told so, else this process itself."""
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ[BEGAN])
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def read_timeline(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """The lines that have a time and an event, in the order in which they were written."""
    for line in json_lines.read(paths.timeline):
        t, event = line.get("t"), line.get("event")
        if isinstance(t, (int, float)) and not isinstance(t, bool) and 0 < t < 1e11 and isinstance(event, str):
            yield line
