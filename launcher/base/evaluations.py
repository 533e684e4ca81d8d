"""evaluations/checkpoint-N.json: what an evaluation in the background found of a checkpoint. Standard library only.

Written by the evaluating process, whole or not at all; read by the run at a step border and by `launcher checkpoints`.
They stay when retention deletes the checkpoint, since the best is decided by all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.base import files, manifest
from launcher.base.paths import RunPaths

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)\.json")


@dataclass(frozen=True)
class Evaluation:
    """Of one checkpoint."""

    step: int
    checkpoint: str
    """`checkpoint_id` of what was evaluated: another training may have made another checkpoint of the step since."""
    values: dict[str, float]
    """By name, with the prefix eval_."""
    runtime_s: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What the metric showed."""


def checkpoint_id(folder: Path) -> str | None:
    """The same for the same bytes of everything in a checkpoint; None where it is none of ours."""
    with contextlib.suppress(OSError, ValueError):
        data = files.read_bytes(folder / manifest.NAME, files.MAX_JSON_BYTES, within=folder)
        return hashlib.sha256(data).hexdigest()
    return None


def write(paths: RunPaths, evaluation: Evaluation) -> None:
    """Durable when it returns. Raises: OSError."""
    files.make_dirs(paths.evaluations_dir, within=paths.root)
    files.write_json(paths.evaluation(evaluation.step), asdict(evaluation), within=paths.root)


def read(paths: RunPaths, step: int) -> Evaluation | None:
    """That of one step; None where there is none, or it is of a checkpoint that was made anew since."""
    raw = files.read_json_or(paths.evaluation(step), {}, within=paths.root)
    try:
        found = Evaluation(**raw)
    except TypeError:
        return None
    if not _is_sound(found, step):
        return None
    now = checkpoint_id(paths.checkpoint_dir(step))
    return found if now in (None, found.checkpoint) else None


def _is_sound(found: Evaluation, step: int) -> bool:
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (found.runtime_s, found.step))
    return (
        is_number and found.step == step and isinstance(found.values, dict) and isinstance(found.samples, list)
        and all(isinstance(v, (int, float)) for v in found.values.values())
        and all(isinstance(sample, dict) for sample in found.samples)
    )  # fmt: skip


def steps(paths: RunPaths) -> list[int]:
    """Those that there are files of, rising."""
    if not paths.evaluations_dir.is_dir():
        return []
    return sorted(int(m[1]) for path in paths.evaluations_dir.iterdir() if (m := _NAME.fullmatch(path.name)))


def remove_beyond(paths: RunPaths, step: int) -> None:
    """Removes those of later steps, which are trained again, and what a kill left half written."""
    if not paths.evaluations_dir.is_dir():
        return
    for path in list(paths.evaluations_dir.iterdir()):
        found = _NAME.fullmatch(path.name)
        if path.name.startswith(".checkpoint-") or (found and int(found[1]) > step):
            files.remove_file(path, within=paths.root)
