"""Runs the jobs of a sweep on this machine: each a process of its own on its own devices, as many at once as fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launcher.base import files, lock, words
from launcher.base.errors import RunLockLostError, UserError
from launcher.base.first_moments import put_back
from launcher.sweep import jobs
from launcher.sweep.devices import Slot
from launcher.sweep.jobs import Job, SweepPaths
from launcher.sweep.runs import FAILED, Metric, RunStatus

_POLL_S = 0.05
_WATCH_S = 1.0
_PROGRESS_S = 30.0
_SAME_PRESS_S = 0.5
"""Signals this close together are one request: a terminal, a batch system and a wrapper may all pass one on."""
_KILL_S = 5.0
_OLD_JOB_TERM_S = 10.0
_OLD_JOB_KILL_S = 180.0


class Source(Protocol):
    """Where the jobs come from: a list, or Optuna."""

    def next_job(self) -> Job | None:
        """The next job to start; None where there is none now."""

    def watch(self, job: Job) -> None:
        """Called about once a second while the job runs."""

    def ended(self, job: Job, status: RunStatus) -> None:
        """The job's process has ended."""


class Listed:
    """Jobs known from the start."""

    def __init__(self, pending: list[Job]) -> None:
        self._pending = iter(pending)

    def next_job(self) -> Job | None:
        return next(self._pending, None)

    def watch(self, job: Job) -> None: ...
    def ended(self, job: Job, status: RunStatus) -> None: ...


class StopRequests:
    """Counts SIGINT, SIGTERM and SIGUSR1: the first stops with a save, the second kills. SIGHUP is ignored."""

    def __init__(self) -> None:
        self.count, self._last = 0, -_SAME_PRESS_S

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > _SAME_PRESS_S:
            self.count += 1
        self._last = now

    @contextmanager
    def installed(self) -> Iterator[StopRequests]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in numbers}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield self
        finally:
            put_back(before.items())


@contextmanager
def sweep_lock(paths: SweepPaths) -> Iterator[None]:
    """One controller per sweep; a lock left by a dead one is taken over.

    Raises:
        RunLockedError: another controller is alive.
    """
    paths.root.mkdir(parents=True, exist_ok=True)
    held = lock.RunLock(paths.lock)
    held.on_lost = _stop_after_loss
    held.acquire([os.getpid()], lambda text: print(f"launcher: {text}", flush=True))
    try:
        yield
    finally:
        held.release()


def _stop_after_loss(error: RunLockLostError) -> None:
    print(f"launcher: {error}", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # every job stops with a save; they have locks of their own


@dataclass
class _Running:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    started: float
    watched: float


class LocalController:
    """Starts the next job the moment a slot is free; one that fails never stops the others."""

    def __init__(self, slots: list[Slot], metric: Metric, stop: StopRequests, say: Callable[[str], None]) -> None:
        self._free, self._metric, self._stop, self._say = list(reversed(slots)), metric, stop, say
        self._running: list[_Running] = []
        self._num_signals_sent = 0
        self._told = time.monotonic()

    def run(self, source: Source) -> None:
        """Returns when no job runs and none is left, or all have stopped on request."""
        try:
            while True:
                self._collect(source)
                if self._stop.count == 0:
                    self._fill(source)
                else:
                    self._pass_on_stop()
                if not self._running:
                    return
                self._tell_progress()
                time.sleep(_POLL_S)
        finally:
            for running in self._running:  # an error of our own: nothing may outlive the controller
                running.process.kill()

    def _fill(self, source: Source) -> None:
        while self._free and (job := source.next_job()) is not None:
            now = time.monotonic()
            try:
                process = start(job, self._free[-1])
            except (OSError, UserError) as error:  # a link or a file in its place, a full disk
                self._say(f"failed    {job.name}: {error}")
                source.ended(job, RunStatus(str(job.output_dir), FAILED))
                continue
            slot = self._free.pop()
            self._running.append(_Running(job, slot, process, now, now))
            self._say(f"started   {job.name} on {slot.devices}")

    def _collect(self, source: Source) -> None:
        now = time.monotonic()
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                if now - running.watched >= _WATCH_S:
                    running.watched = now
                    source.watch(running.job)
                continue
            self._running.remove(running)
            self._free.append(running.slot)
            self._note_end(running.job, code)
            status = jobs.read_job(running.job.output_dir, self._metric)
            self._say(
                f"{status.state:<9} {running.job.name} after {now - running.started:.0f} s{_why(running, status)}"
            )
            source.ended(running.job, status)

    def _note_end(self, job: Job, code: int) -> None:
        record = jobs.job_record(job.output_dir)
        known = files.read_json_or(record, {}, within=job.output_dir)
        end = {"exit_code": code, "was_killed": self._num_signals_sent > 1}
        try:
            files.write_json(record, {**known, **end}, within=job.output_dir)
        except OSError as error:  # the other jobs go on; this one's run.json says how it stands
            self._say(f"{job.name} ended with exit code {code}, and that cannot be noted: {error}")

    def _tell_progress(self) -> None:
        """From time to time how far the running jobs have come."""
        if time.monotonic() - self._told < _PROGRESS_S:
            return
        self._told = time.monotonic()
        for running in self._running:
            status = jobs.read_job(running.job.output_dir, self._metric)
            total = f" of {status.total_steps}" if status.total_steps else ""
            loss = f", loss {words.metric(status.loss)}" if status.loss is not None else ""
            best = status.best_metric if self._metric.key != "loss" else None
            metric = f", {self._metric.key} {words.metric(best)}" if best is not None else ""
            self._say(f"running   {running.job.name} step {status.step}{total}{loss}{metric}")

    def _pass_on_stop(self) -> None:
        """First request: SIGTERM, and every job saves. Second: SIGINT, which ends a run at once; then SIGKILL."""
        wanted = min(self._stop.count, 2)
        if self._num_signals_sent < wanted:
            self._num_signals_sent = wanted
            self._stopped_at = time.monotonic()
            if wanted == 1:
                self._say(f"stopping {len(self._running)} jobs, each with a save; once more kills them")
            for running in self._running:
                running.process.send_signal(signal.SIGTERM if wanted == 1 else signal.SIGINT)
        elif wanted == 2 and time.monotonic() - self._stopped_at > _KILL_S:
            for running in self._running:
                running.process.kill()


def start(job: Job, slot: Slot) -> subprocess.Popen[bytes]:
    """Starts a job in a session of its own; what it prints goes to the job's logs/.

    Raises:
        UserError, OSError: its folder is a link or cannot be written.
    """
    log, record = jobs.job_log(job.output_dir), jobs.job_record(job.output_dir)
    jobs.make_folders(job.output_dir)
    info = {"path": str(record), "devices": slot.devices, "overrides": list(job.overrides), "started_at": time.time()}
    own = [sys.executable, "-m", "launcher.sweep.child", str(os.getpid()), json.dumps(info)]
    with files.open_append(log, within=job.output_dir) as output:
        return subprocess.Popen(
            [*own, *jobs.job_command(job)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **slot.env}, start_new_session=True,
        )  # fmt: skip


def _why(running: _Running, status: RunStatus) -> str:
    code = running.process.returncode
    if status.state != FAILED and code >= 0:
        return ""
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return f" ({how}, see {jobs.job_log(running.job.output_dir)})"


def wait_for_old_jobs(folders: list[Path], stop: StopRequests, say: Callable[[str], None]) -> None:
    """Waits until the jobs of a controller that was killed have stopped. They got SIGTERM when it died, and save."""
    began, was_told = time.monotonic(), False
    to_send = [(_OLD_JOB_TERM_S, signal.SIGTERM), (_OLD_JOB_KILL_S, signal.SIGKILL)]
    while stop.count == 0:
        living = [pid for folder in folders if (pid := jobs.job_process(folder)) is not None]
        if not living:
            return
        if not was_told:
            was_told = True
            say(f"waiting for {len(living)} jobs of an earlier controller to stop")
        if to_send and time.monotonic() - began > to_send[0][0]:
            _send(living, to_send.pop(0)[1])
        time.sleep(_POLL_S)


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
