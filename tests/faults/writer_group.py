"""All processes of a fake run in one: real `Checkpointer`s with real writers, summed over by hand."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from launcher.base.lock import Fence
from launcher.base.paths import RunPaths
from launcher.checkpoint.engine import Checkpointer
from launcher.checkpoint.layout import TensorSpec, plan_files
from launcher.checkpoint.save_result import SaveResult
from launcher.checkpoint.snapshot import SnapshotPlan

NUMEL = 300_000


class FakeProcesses:
    """One of `world_size` processes; the test itself sums over them."""

    _gathered: ClassVar[list[Any]] = []

    def __init__(self, rank: int, world_size: int, is_one_machine: bool) -> None:
        self.rank, self.world_size, self.is_one_machine = rank, world_size, is_one_machine
        self.members: list[Checkpointer] = []

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Of a run of one process."""
        assert self.world_size == 1
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, tuple):  # of a save that failed; the main process asks first
            if self.is_main:
                self._gathered[:] = [m._how_it_failed() for m in self.members]
            return list(self._gathered)
        if not self.is_main:
            return [value]
        return [m._flight.hashed for m in self.members if m._flight is not None]


class Group:
    """All processes of a fake run, in one."""

    def __init__(
        self, root: Path, world_size: int, *, is_async: bool = True, hang_timeout_s: float = 600.0,
        fence: Fence | None = None, low_memory: bool = False, is_one_machine: bool = True,
        alive: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.paths = RunPaths(root)
        self.tensor = torch.arange(NUMEL, dtype=torch.float32)
        processes = [FakeProcesses(rank, world_size, is_one_machine) for rank in range(world_size)]
        self.members = processes[0].members = [
            Checkpointer(
                processes[rank], lambda rank=rank: self._plan(rank, world_size),  # type: ignore[arg-type,misc]
                {"config.json": b"{}"} if rank == 0 else {}, zero_stage=0, is_async=is_async,
                device=torch.device("cpu"), hang_timeout_s=hang_timeout_s,
                fence=fence if rank == 0 else None, low_memory=low_memory, alive=alive,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    def _plan(self, rank: int, world_size: int) -> SnapshotPlan:
        files = plan_files("model", [TensorSpec("w", "F32", (NUMEL,))], {"format": "pt"})
        low, high = rank * NUMEL // world_size, (rank + 1) * NUMEL // world_size
        place = files[0].places[0]
        plan = SnapshotPlan(files, heads=tuple(f.path for f in files if rank == 0))
        plan.add(lambda: self.tensor, low, high, torch.float32, place.path, place.offset + low * 4)
        return plan

    def save(self, step: int) -> None:
        for member in self.members:
            texts = {"state/state.json": "{}", "trainer_state.json": "{}"} if member is self.members[0] else {}
            self.save_of(member, step, texts)

    def save_of(self, member: Checkpointer, step: int, texts: dict[str, str]) -> None:
        member.save(step, texts, self.paths.checkpoint_dir(step))
        member.finish_snapshot()  # as the loop does before each optimizer step

    def tick(self) -> SaveResult | None:
        """What the loop's all-reduce does at the end of each step."""
        sums = list(map(sum, zip(*(m.status() for m in self.members), strict=True)))
        results = [m.advance(*sums) for m in self.members]
        return results[0]

    def finish(self, seconds: float = 300.0) -> SaveResult:
        deadline = time.monotonic() + seconds
        while (result := self.tick()) is None:
            assert time.monotonic() < deadline, "the save never ended"
            time.sleep(0.005)
        return result

    def close(self) -> None:
        for member in self.members:
            if member.writer_pid not in (None, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.writer_pid, signal.SIGCONT)
            member.close()
