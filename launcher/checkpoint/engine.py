"""The checkpointer: one save in flight, all processes in lockstep, nothing visible before everything is durable.

A save goes through three phases. All processes change phase together, because they only do so in `advance`, with sums
over all processes that the loop's one exchange per step brings:

    IDLE → WRITING: every writer puts its ranges into `.tmp-checkpoint-N` → HASHING: every writer reads its share of the
    files back → COMMITTING: the main process's writer writes the manifest and renames → IDLE

Steps can take long, and a kill costs what no save has yet. So the writers of one machine do not wait for the phases:
they go on by themselves (`writer`, "Ahead"), and once the main process's has committed, the save has ended, in any
phase.
"""

from __future__ import annotations

import base64
import enum
import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launcher.base import files, manifest
from launcher.base.device_memory import free_host_bytes
from launcher.base.errors import CheckpointWriteError
from launcher.base.lock import Fence
from launcher.base.process import host
from launcher.base.processes import Processes
from launcher.checkpoint import low_memory, snapshot
from launcher.checkpoint.layout import deal_out
from launcher.checkpoint.save_result import SaveResult
from launcher.checkpoint.sender import SnapshotSender
from launcher.checkpoint.snapshot import SnapshotPlan
from launcher.checkpoint.writer_client import InlineWriter, SnapshotBuffer, WriterClient, WriterDied

_MARGIN_BYTES = 16 * 2**20
"""Kept free for metrics, logs and the manifest."""


class Phase(enum.Enum):
    IDLE = "idle"
    WRITING = "writing"
    HASHING = "hashing"
    COMMITTING = "committing"


@dataclass
class _InFlight:
    step: int
    started: float
    stall_s: float
    sizes: dict[str, int]
    commit: dict[str, Any]
    was_taken: bool
    """Whether something had the checkpoint's name before."""
    hashed: list[dict[str, Any]] = field(default_factory=list)


class Checkpointer:
    """Saves a run's state. Everything except `status` is collective.

    Args:
        plan: gives the snapshot plan; called at each save, when the optimizer has its state.
        statics: files that are the same in every checkpoint, by relative path (main process).
        hang_timeout_s: a writer that did nothing for so long is ended, and its save fails.
        fence: the run's lock (main process): without it nothing is committed, deleted or discarded.
        low_memory: write piece by piece while training waits, without a copy; None: where host memory is short.
        alive: called in that wait, for the watchdog; a writer that stands still is ended after hang_timeout_s.
    """

    def __init__(
        self, processes: Processes, plan: Callable[[], SnapshotPlan], statics: dict[str, bytes], *, zero_stage: int,
        is_async: bool, device: torch.device, hang_timeout_s: float = math.inf, fence: Fence | None = None,
        low_memory: bool | None = False, alive: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._low_memory, self._alive = low_memory, alive
        self._processes, self._make_plan = processes, plan
        self._zero_stage, self._hang_timeout_s, self._fence = zero_stage, hang_timeout_s, fence
        self._cuda = device.type == "cuda"
        self._buffer = SnapshotBuffer()
        self._statics = statics
        kind = WriterClient if is_async else InlineWriter
        self._writer: WriterClient | InlineWriter = kind(self._buffer, statics)
        self._plan: SnapshotPlan | None = None
        self._sender = SnapshotSender(self._buffer, self._send_snapshot, is_cuda=self._cuda, in_background=is_async)
        self._num_saves = 0
        self._flight: _InFlight | None = None
        self._own_work_done = True
        self._own_error: str | None = None
        self._num_outstanding = 0  # answers to retain and discard that have not come yet
        self._target, self._attempt = Path(), 0
        self.phase = Phase.IDLE
        self.undeleted: str | None = None
        """Why a checkpoint that was to go is still there, as the writer said last; main process."""
        self.notices: list[str] = []
        """What the user should know of how saves are made here; said once."""

    @property
    def writer_pid(self) -> int | None:
        return self._writer.pid

    @property
    def stall_s(self) -> float:
        """Of the save in flight, so far."""
        return 0.0 if self._flight is None else self._flight.stall_s

    @property
    def plan(self) -> SnapshotPlan:
        """Of the next save; the plan's maker knows when it has to be a new one."""
        return self._plan or self._make_plan()

    # ------------------------------------------------------------------ save

    def needed_bytes(self) -> int:
        """What a save needs on disk, of all processes together."""
        return self.plan.total_bytes + sum(map(len, self._statics.values())) + _MARGIN_BYTES

    def reserve(self) -> None:
        """Takes the host memory of a save now, rather than hours later inside the first one. Collective.

        Raises:
            CheckpointWriteError: there is not enough.
        """
        if self._low_memory is None:
            mine = (host(), self.plan.buffer_bytes, free_host_bytes())
            reasons = low_memory.shortage(self._processes.gather(mine))
            self._low_memory = host() in reasons
            if reasons:
                self.notices.append(low_memory.notice(reasons, self.plan.buffer_bytes))
        try:
            self._reserve(self.plan)
        except (OSError, MemoryError) as error:
            cure = "More processes or another strategy hold less each (strategy=zero3)"
            if getattr(error, "errno", None) == errno.EFBIG:
                cure = "The shell's limit of files counts for it, and for those of checkpoints: ulimit -f unlimited"
            raise CheckpointWriteError(
                f"a save keeps a copy of this process's state in host memory, and {self.plan.buffer_bytes:,} bytes "
                f"cannot be had: {error}. {cure}; to train without checkpoints: checkpoint=off"
            ) from error

    def _reserve(self, plan: SnapshotPlan) -> None:
        size = min(plan.buffer_bytes, low_memory.PIECE_BYTES) if self._low_memory else plan.buffer_bytes
        if self._buffer.reserve(size, pin=self._cuda):
            self._writer.stop()  # it has the old one
            if self._cuda and not self._buffer.is_pinned and not self.notices:
                self.notices.append(
                    "host memory for the copies of saves could not be pinned (ulimit -l?): each save stops training "
                    "for the time of its copy"
                )

    def use_plan(self, plan: SnapshotPlan) -> None:
        """Replaces the plan, for the last save of a run without checkpoints."""
        self._plan = plan

    def save(self, step: int, texts: dict[str, str], target: Path) -> float:
        """Snapshots the state of `step` and hands it to the writers; the folder `target` appears later.

        Collective; the phase must be IDLE. After a crash only `.tmp-NAME` beside it can remain, which resume ignores.

        Args:
            texts: this process's small files, by relative path.

        Returns:
            Seconds that the call took.
        """
        assert self.phase is Phase.IDLE, "a save is still in flight"
        started = time.monotonic()
        plan, folder = self.plan, self._temporary(target)
        self._own_error, self._own_work_done = None, False
        self._num_saves += 1
        main = self._processes.is_main
        sizes = {f.path: f.num_bytes for f in plan.files}
        heads = {f.path: base64.b64encode(f.header).decode() for f in plan.files if f.path in plan.heads}
        command = {
            "cmd": "write", "save": self._num_saves, "step": step, "dir": str(folder), "files": sizes, "heads": heads,
            "ranges": plan.ranges, "texts": {**texts, **plan.texts}, "statics": main,
        }  # fmt: skip
        commit = {
            "cmd": "commit", "save": self._num_saves, "step": step, "dir": str(folder), "target": str(target),
            "world_size": self._processes.world_size, "zero_stage": self._zero_stage, "files": list(sizes),
            "fence": self._fence,
        }  # fmt: skip
        self.phase = Phase.WRITING
        self._flight = _InFlight(step, started, 0.0, sizes, commit, files.is_taken(target))
        try:
            self._reserve(plan)
            if not self._writer.is_alive:
                self._num_outstanding = 0
            self._writer.start()
            if not self._low_memory:
                self._sender.begin(plan, {**command, "ahead": self._ahead(sizes, commit)})
        except (OSError, MemoryError, WriterDied) as error:
            self._own_error = f"no snapshot could be taken: {error}"
        if self._low_memory:
            self._write_in_pieces(plan, command)
        self._flight.stall_s = time.monotonic() - started
        return self._flight.stall_s

    def _ahead(self, sizes: dict[str, int], commit: dict[str, Any]) -> dict[str, Any] | None:
        """What the writer needs to go on by itself, where all writers see the same files at once: on one machine."""
        if not self._processes.is_one_machine or isinstance(self._writer, InlineWriter):
            return None
        rank, world_size = self._processes.rank, self._processes.world_size
        return {
            "identity": f"{os.getppid()}-{self._num_saves}", "rank": rank, "world_size": world_size,
            "files": deal_out(sizes, world_size)[rank], "commit": commit if self._processes.is_main else None,
        }  # fmt: skip

    def _write_in_pieces(self, plan: SnapshotPlan, command: dict[str, Any]) -> None:
        """Returns when this process's part is written, or has failed: the state does not change before."""
        for number, piece in enumerate(low_memory.pieces(plan, low_memory.PIECE_BYTES)):
            if self._own_error is not None:
                return
            snapshot.take(piece.copies, self._buffer.tensor)
            if self._cuda:
                torch.cuda.current_stream().synchronize()
            more = {} if number == 0 else {"heads": {}, "texts": {}, "statics": False}
            self._own_work_done = False
            self._try_send({**command, **more, "ranges": piece.ranges, "piece": number})
            while not self._own_work_done and self._own_error is None:
                self.status(timeout_s=1.0)
                self._alive()

    def _temporary(self, target: Path) -> Path:
        """Where a save is written before it gets its name; a second attempt at it has a folder of its own, since the
        first one's may still be being discarded."""
        self._attempt = self._attempt + 1 if target == self._target else 1
        self._target = target
        name = target.name if target.name.startswith(".tmp-") else f".tmp-{target.name}"
        return target.with_name(name if self._attempt == 1 and name != target.name else f"{name}.{self._attempt}")

    def finish_snapshot(self) -> None:
        """Waits for the copies and has them sent to the writer. The loop calls it before each optimizer step: until
        then the state cannot change, so the copies run beside the next forward and backward."""
        if self.phase is not Phase.WRITING or self._flight is None:
            return
        self._flight.stall_s += self._sender.finish()

    def _send_snapshot(self, command: dict[str, Any]) -> None:
        if self._own_error is None:
            self._try_send(command)

    def _try_send(self, command: dict[str, Any]) -> None:
        try:
            self._writer.send(command)
        except Exception as error:  # whatever it is: nobody listens to the thread that copies
            self._own_error = str(error) or repr(error)

    # ------------------------------------------------------------------ progress of the save in flight

    def status(self, timeout_s: float = 0.0) -> tuple[int, int, int]:
        """(1 while this process works on its part of the phase, 1 if it failed, 1 where it has committed), to be summed
        over all processes."""
        if self.phase is Phase.IDLE and not self._num_outstanding:
            return 0, 0, 0
        if self.phase is Phase.WRITING and self._sender.is_pending and timeout_s:
            self.finish_snapshot()
        try:
            has_work = not self._own_work_done or self._num_outstanding
            answers = self._writer.poll(timeout_s if has_work else 0.0)
            self._end_idle_writer(self._hang_timeout_s)
        except WriterDied as error:
            answers, self._num_outstanding = [], 0
            if self.phase is not Phase.IDLE and not self._own_work_done:
                self._own_error = str(error)
        for answer in answers:
            self._take(answer)
        has_failed = self._own_error is not None
        is_committed = self._flight is not None and "bytes" in self._flight.commit
        return int(not self._own_work_done and not has_failed), int(has_failed), int(is_committed)

    @property
    def is_stuck(self) -> bool:
        """Whether this process's writer has work and stands still: stopped, or its file system does not answer."""
        return self._writer.standstill_s() > self._writer.patience_s()

    def _end_idle_writer(self, patience_s: float) -> None:
        """Raises: WriterDied, after a writer that has stood still for longer was ended."""
        standstill_s = self._writer.standstill_s()
        if standstill_s > patience_s:
            pid = self._writer.pid
            self._writer.kill()
            raise WriterDied(f"the writer process {pid} stood still for {standstill_s:.0f} s and was ended")

    def _take(self, answer: dict[str, Any]) -> None:
        event, flight = answer["event"], self._flight
        if event in ("retained", "discarded") or answer.get("cmd") in ("retain", "discard"):
            self._num_outstanding -= 1
            if event == "failed" and answer["cmd"] == "retain":
                self.undeleted = answer["error"]
        elif flight is None or answer["save"] != flight.commit["save"]:  # a step may be saved again
            return
        elif event == "failed":
            self._own_error = answer["error"]
        elif event == "committed":
            flight.commit["bytes"] = answer["bytes"]
            self._own_work_done = True
        else:
            self._own_work_done = True
            if event == "hashed":
                flight.hashed = answer["entries"]

    def advance(self, num_undone: float, num_failed: float, num_committed: float) -> SaveResult | None:
        """Moves to the next phase when all processes are ready; gives the result when a save has ended.

        Args:
            num_undone, num_failed, num_committed: `status()` summed over all processes.
        """
        flight = self._flight
        if flight is None:
            return None
        main = self._processes.is_main
        if num_committed:  # whatever became of a writer since: it is whole and has its name
            return self._end_well(flight, flight.commit.get("bytes", 0))
        if num_undone:  # also after a failure elsewhere: a writer that still works would put files back
            return None
        if num_failed:
            self._sender.drop()
            errors, there = zip(*self._processes.gather(self._how_it_failed()), strict=True)
            if any(there):
                return self._end_well(flight, max(there))
            if main:
                where = {key: flight.commit[key] for key in ("dir", "target")}
                self._outstanding({"cmd": "discard", "step": flight.step, **where})
            self._end()
            return SaveResult(flight.step, flight.stall_s, error=next((e for e in errors if e), "unknown"))
        if self.phase is Phase.WRITING:
            self.phase = Phase.HASHING
            share = deal_out(flight.sizes, self._processes.world_size)[self._processes.rank]
            told = {key: flight.commit[key] for key in ("save", "step", "dir")}
            self._begin({"cmd": "hash", **told, "files": share})
        elif self.phase is Phase.HASHING:
            self.phase = Phase.COMMITTING
            hashed = [entry for part in self._processes.gather(flight.hashed) for entry in part]
            if main:
                self._begin({**flight.commit, "hashed": hashed})
        return None

    def _end_well(self, flight: _InFlight, num_bytes: int) -> SaveResult:
        self._end()
        return SaveResult(flight.step, flight.stall_s, time.monotonic() - flight.started, num_bytes)

    def _note_death(self) -> None:
        """A new writer knows nothing of what the one before had to do."""
        self.status()  # what it said last
        self._num_outstanding = 0
        flight = self._flight
        if flight is not None and self._own_error is None and "bytes" not in flight.commit:
            self._own_error = "the writer process ended"

    def _how_it_failed(self) -> tuple[str | None, int]:
        """The error, and the bytes of the checkpoint if it is there all the same: the main process's writer may have
        died between its commit and its answer."""
        flight = self._flight
        may_be_there = flight is not None and self._processes.is_main and not flight.was_taken
        if flight is None or not may_be_there or files.is_taken(Path(flight.commit["dir"])):
            return self._own_error, 0
        target = Path(flight.commit["target"])
        try:
            files.fsync_dir(target.parent)  # its name, too
        except OSError:
            return self._own_error, 0
        return self._own_error, manifest.bytes_of(target)

    def _begin(self, command: dict[str, Any]) -> None:
        self._own_work_done = False
        self._try_send(command)

    def _end(self) -> None:
        self._sender.end()
        self.phase, self._flight = Phase.IDLE, None
        self._own_error, self._own_work_done = None, True

    def _outstanding(self, command: dict[str, Any]) -> None:
        """Something to do behind everything else, whose failure fails no save: the next start cleans up as well."""
        is_alive = self._writer.is_alive
        if not is_alive:
            self._note_death()
        self._num_outstanding += 1
        try:
            if not is_alive:
                self._writer.start()
            self._writer.send({**command, "fence": self._fence})
        except (OSError, WriterDied):
            self._num_outstanding = 0

    def wait(
        self, on_wait: Callable[[], None] = lambda: None, is_urgent: Callable[[], bool] = lambda: False
    ) -> SaveResult | None:
        """Waits until no save is in flight; gives its result if one was. Collective.

        Where a writer stands still it returns early, with the save still in flight: training goes on meanwhile, and
        after hang_timeout_s the writer is ended. If the wait is urgent on any process, it is ended at once instead.
        """
        result = None
        while self.phase is not Phase.IDLE and result is None:
            asked = [*self.status(timeout_s=0.2), self.is_stuck, is_urgent()]
            *sums, num_stuck, num_urgent = self._processes.sum(asked)
            if num_stuck and not num_urgent:
                return None
            if num_stuck:
                self._replace_stuck()
            else:
                result = self.advance(*sums)
            on_wait()
        return result

    def _replace_stuck(self) -> None:
        if self.is_stuck:
            try:
                self._end_idle_writer(0.0)
            except WriterDied as error:
                self._num_outstanding, self._own_error = 0, str(error)

    def settle(self) -> None:
        """Main process: waits until what a failed save left behind is gone from the disk, so that its room is free."""
        while self._num_outstanding and not self.is_stuck:
            self.status(timeout_s=0.2)

    def expire(self, folders: list[Path], durable: Sequence[Path] = ()) -> None:
        """Main process: has the writer delete these checkpoints (rename first), behind whatever it does.

        Args:
            durable: folders that must have reached the disk before, with all in them.
        """
        if folders:
            paths = {"expired": [str(f) for f in folders], "durable": [str(f) for f in durable]}
            self._outstanding({"cmd": "retain", "step": -1, **paths})

    def close(self) -> None:
        """Ends the writer once it has done all it was told."""
        self.finish_snapshot()
        self._writer.close()
        self._buffer.close()
