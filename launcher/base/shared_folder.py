"""All processes of a run prove that their output_dir is one and the same folder.

A folder that two machines each have of their own takes half of every checkpoint: the other half would be zeros, with
the right size. Host names tell nothing (containers share them), nor do paths; only what one writes and another reads.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from launcher.base.errors import UserError
from launcher.base.process import host

_WAIT_S = 10.0
"""Network file systems show new files late. A name that was never looked up before is not cached as missing."""


class Group(Protocol):
    """Processes that talk: those of a run (`launcher.base.processes.Processes`), or one of each machine before it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def is_local_main(self) -> bool: ...
    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


def check_shared(folder: Path, processes: Group) -> None:
    """Every process reads what the main one wrote, and the main one what each machine wrote. Collective; no file stays.

    Raises:
        UserError: on every process; names both paths and hosts.
    """
    if processes.world_size == 1:
        return
    nonce, main_root, main_host, problem = processes.broadcast(_write_proof(folder) if processes.is_main else None)
    mine = _proof(folder, nonce, processes.rank)
    if not processes.is_main:
        problem = problem or _answer(folder, nonce, mine if processes.is_local_main else None)
    told = processes.gather((host(), str(folder), processes.is_local_main, problem))
    if processes.is_main:
        told = [(*one[:3], one[3] or _check_answer(folder, nonce, rank, one[2])) for rank, one in enumerate(told)]
    told = processes.broadcast(told)
    for path in (mine, *([_proof(folder, nonce, None)] if processes.is_main else [])):
        with contextlib.suppress(OSError):
            path.unlink()
    wrong = [(rank, *one) for rank, one in enumerate(told) if one[3]]
    if wrong:
        rank, where, root, _, why = wrong[0]
        raise UserError(
            f"output_dir is not the same folder for all processes: rank 0 has {main_root} on host {main_host}, "
            f"rank {rank} has {root} on host {where}: {why}. Half of every checkpoint would be lost. Set output_dir to "
            "the same absolute path, on a file system that all machines share: output_dir=/SHARED/…"
        )


def _proof(folder: Path, nonce: str, rank: int | None) -> Path:
    return folder / f".shared-{nonce}{'' if rank is None else f'-{rank}'}"


def _write_proof(folder: Path) -> tuple[str, str, str, str | None]:
    nonce, problem = uuid.uuid4().hex, None
    try:
        for stale in folder.glob(".shared-*"):  # of a start that was killed here
            stale.unlink(missing_ok=True)
        _proof(folder, nonce, None).write_text(nonce, encoding="utf-8")
    except OSError as error:
        problem = f"it cannot be written: {error}"
    return nonce, str(folder), host(), problem


def _answer(folder: Path, nonce: str, path: Path | None) -> str | None:
    """Reads the main process's file, then writes one of its own where a path is given."""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # asks the server, where a missing folder is still cached as missing
        if (problem := _read_proof(_proof(folder, nonce, None), nonce)) is None and path is not None:
            path.write_text(nonce, encoding="utf-8")
    except OSError as error:
        problem = f"it cannot be written: {error}"
    return problem


def _check_answer(folder: Path, nonce: str, rank: int, is_local_main: bool) -> str | None:
    if rank == 0 or not is_local_main:
        return None
    return _read_proof(_proof(folder, nonce, rank), nonce)


def _read_proof(path: Path, nonce: str) -> str | None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            if path.read_text(encoding="utf-8") == nonce:
                return None
            problem = f"{path.name} holds something else there"
        except OSError as error:
            problem = f"{path.name}, written by the other, is not there ({error.strerror})"
        if time.monotonic() > deadline:
            return problem
        time.sleep(0.05)
