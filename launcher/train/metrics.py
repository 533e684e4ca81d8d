"""What a run writes down: metrics.jsonl, run.json, and samples. Main process only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.agent import out_of_memory
from launcher.base import files, json_lines
from launcher.base.errors import UserError
from launcher.base.full_disk import rewrite_json
from launcher.base.paths import RunPaths
from launcher.base.process import host


class MetricsFile:
    """metrics.jsonl: a line per logged step, evaluation and save. Main process only.

    A full disk must not end a run: the lines that it refuses are written when there is room again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refused: list[bytes] = []

    def append(self, line: dict[str, Any]) -> None:
        self._refused = [*self._refused[-_MAX_REFUSED:], (json.dumps(line) + "\n").encode()]
        self.write_refused()

    def write_refused(self) -> None:
        """Tries once more."""
        if self._refused:
            with contextlib.suppress(OSError):
                json_lines.append(self._path, b"".join(self._refused))
                self._refused = []

    def append_once(self, line: dict[str, Any]) -> None:
        if line not in json_lines.read(self._path):
            self.append(line)

    def last(self, key: str) -> Any:
        """The newest number of a key, also of an earlier start; None where there is none."""
        lines = json_lines.read_backwards(self._path, key)
        return next((v for line in lines if isinstance(v := line.get(key), (int, float))), None)

    def trim(self, step: int) -> list[dict[str, Any]]:
        """Removes lines beyond `step`, and one that a crash cut off; returns the former.

        Raises:
            UserError: it cannot be replaced; the old one is whole.
        """
        self._refused = [raw for raw in self._refused if _is_up_to(raw, step)]
        if not self._path.is_file():
            return []
        kept, removed, is_changed = [], [], False
        try:
            with files.open_read(self._path) as file:
                for raw in file:
                    if _is_up_to(raw, step):
                        kept.append(raw)
                        continue
                    is_changed = True
                    for line in _parsed(raw):
                        at = line.get("step", 0)
                        if isinstance(at, (int, float)) and at <= step:
                            kept.append((json.dumps(line) + "\n").encode())
                        elif isinstance(at, (int, float)):
                            removed.append(line)
            if is_changed:
                files.replace_file(self._path, b"".join(kept))
        except OSError as error:
            raise UserError(
                f"output_dir={self._path.parent}: {self._path.name} cannot be rewritten: {error}"
            ) from error
        return removed


_MAX_REFUSED = 100_000
_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')


def _is_up_to(raw: bytes, step: int) -> bool:
    """Whether a whole line of ours is of this step or of one before, without parsing it: there may be a million."""
    found = _STEP.match(raw)
    return found is not None and raw.endswith(b"}\n") and int(found[1]) <= step


def _parsed(raw: bytes) -> list[dict[str, Any]]:
    with contextlib.suppress(ValueError):
        line = files.parse_json(raw)
        return [line] if isinstance(line, dict) else []
    return []


_MAX_SAMPLES, _MAX_SAMPLE_CHARS, _MAX_SAMPLES_BYTES = 8, 2000, 8 * 2**20


class SamplesFile:
    """logs/samples.jsonl: what the model wrote in each evaluation, of bounded size. Main process only."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def append(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps({"step": step, **_cut(sample)}) + "\n" for sample in samples[:_MAX_SAMPLES])
        if lines:
            with contextlib.suppress(OSError):
                json_lines.append(
                    self._paths.samples, lines.encode(), within=self._paths.root, max_bytes=_MAX_SAMPLES_BYTES
                )


def _cut(sample: dict[str, Any]) -> dict[str, Any]:
    kept = {key: sample.get(key) for key in ("prompt", "answer", "expected", "is_right")}
    return {key: value[:_MAX_SAMPLE_CHARS] if isinstance(value, str) else value if isinstance(value, bool) else None
            for key, value in kept.items()}  # fmt: skip


_RUN_FILE_S, _RUN_FILE_SHARE = 5.0, 0.01
"""How often run.json tells of mere progress, and which share of the time that may take on a slow disk."""


class RunFile:
    """run.json: the authority on how a run stands. Main process only."""

    def __init__(self, paths: RunPaths, world_size: int) -> None:
        self._path = paths.run_state
        self._due = 0.0
        self._fields: dict[str, Any] = {
            "state": "running", "reason": None, "exit_code": None, "step": 0, "total_steps": None, "epoch": 0.0,
            "world_size": world_size, "host": host(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID"),
            "started_at": time.time(), "attempt": os.environ.get("LAUNCHER_ATTEMPT"),
        }  # fmt: skip
        if (limits := out_of_memory.limits(paths)) is not None:  # of earlier starts
            self._fields[out_of_memory.LIMITS] = limits

    def advance(self, step: int, epoch: float, hub_status: Callable[[], dict[str, Any]]) -> None:
        """Mere progress: written only where the last write is long enough ago, since each one waits for the disk."""
        self._fields |= {"step": step, "epoch": epoch}
        if time.monotonic() >= self._due:
            self.update(hub=hub_status())

    def update(self, **fields: Any) -> None:
        """Changes fields and replaces the file; a disk that refuses is survived."""
        started = time.monotonic()
        self._fields |= {**fields, "updated_at": time.time()}
        with contextlib.suppress(OSError):
            rewrite_json(self._path, self._fields)
        now = time.monotonic()
        self._due = now + max(_RUN_FILE_S, (now - started) / _RUN_FILE_SHARE)
