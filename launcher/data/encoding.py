"""Batches of rows become tokens: here, or in worker processes; the same bytes in the same order either way."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from launcher.base.errors import ConfigError, DataError, LauncherError
from launcher.base.process import die_with_parent
from launcher.data.formats import Encoded, Formatter
from launcher.data.normalise import BadRowError, MissingColumnError
from launcher.data.readers import Batch

MAX_PROBLEMS_SHOWN = 20
MAX_UNUSED = 50
_ALONE_S = 1.0
"""What is done within this time needs no workers."""
_AHEAD = 2
"""Batches that a worker holds: one at work, one waiting."""
_POLL_S = 0.2
_END_S = 2.0
_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass
class BuildReport:
    """What happened to the rows of one source; kept with them, so that a cached start reports it too."""

    num_read: int = 0
    num_kept: int = 0
    num_bad: int = 0
    num_without_column: int = 0  # of num_bad: that data.columns names
    num_truncated: int = 0
    num_unlabelled: int = 0  # nothing left to learn from within max_length: left out
    num_rewritten: int = 0  # the chat template changed the assistant's words
    num_endless: int = 0  # what is learnt from has no special token at its end, and was not cut
    end_tokens: dict[str, int] = field(default_factory=dict)  # id of a special token → rows that end with it
    unused: dict[str, int] = field(default_factory=dict)  # columns and keys that have no effect → rows that have them
    problems: list[str] = field(default_factory=list)  # the first MAX_PROBLEMS_SHOWN

    def add(self, other: BuildReport) -> None:
        """Counts the rows that follow."""
        for name in vars(self):
            if name.startswith("num_"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for token, count in other.end_tokens.items():
            self.end_tokens[token] = self.end_tokens.get(token, 0) + count
        for name, count in other.unused.items():
            if name in self.unused or len(self.unused) < MAX_UNUSED:  # keys may be data: one of its own in every row
                self.unused[name] = self.unused.get(name, 0) + count
        self.problems = [*self.problems, *other.problems][:MAX_PROBLEMS_SHOWN]


@dataclass
class EncodedBatch:
    """The usable rows of a batch, one after the other; `numbers` are their places in it."""

    report: BuildReport
    tokens: np.ndarray
    mask: np.ndarray
    lengths: list[int]
    labelled: list[int]
    numbers: list[int]


def encode_batch(batch: Batch, formatter: Formatter) -> EncodedBatch:
    """What a batch gives follows from its rows alone, not from those that were encoded before."""
    formatter.forget()
    rows, report = batch.rows(), BuildReport()
    encoded = iter(formatter.encode([(row.where, row.value) for row in rows if row.value is not None]))
    kept: list[tuple[int, Encoded]] = []
    for number, row in enumerate(rows):
        result = BadRowError(row.problem) if row.value is None else next(encoded)
        if isinstance(result, BadRowError):
            report.num_bad += 1
            report.num_without_column += isinstance(result, MissingColumnError)
            report.problems.append(f"{row.where}: {result}")
        elif _counted(result, report):
            kept.append((number, result))
    report.num_read, report.num_kept = len(rows), len(kept)
    report.problems = report.problems[:MAX_PROBLEMS_SHOWN]
    dtype = np.uint16 if len(formatter.tokenizer) <= 1 << 16 else np.uint32
    return EncodedBatch(
        report,
        tokens=np.concatenate([np.zeros(0, dtype), *(row.tokens for _, row in kept)]).astype(dtype),
        mask=np.concatenate([np.zeros(0, bool), *(row.mask for _, row in kept)]),
        lengths=[len(row.tokens) for _, row in kept],
        labelled=[int(row.mask.sum()) for _, row in kept],
        numbers=[number for number, _ in kept],
    )


def _counted(row: Encoded, report: BuildReport) -> bool:
    """Whether there is something to learn from in a row."""
    report.num_truncated += row.is_truncated
    report.num_rewritten += row.is_rewritten
    if row.end_token is not None:
        report.end_tokens[str(row.end_token)] = report.end_tokens.get(str(row.end_token), 0) + 1
    else:
        report.num_endless += not row.is_truncated
    for name in sorted(row.unused):
        report.unused[name] = report.unused.get(name, 0) + 1
    has_loss = bool(row.mask.any())
    report.num_unlabelled += not has_loss
    return has_loss


def encode_in_order(
    batches: Iterator[Batch], formatter: Formatter, num_workers: int, alive: Callable[[], None]
) -> Iterator[EncodedBatch]:
    """Encodes batches, in their order, with up to `num_workers` processes once it takes longer than a second.

    Args:
        alive: called all the time; what it raises ends the work.

    Raises:
        DataError: a worker was killed. ConfigError: a setting does not fit the data.
    """
    os.environ.setdefault(_THREADS, "true")
    before = os.environ[_THREADS]
    if num_workers == 1:
        os.environ[_THREADS] = "false"
    try:
        until = time.monotonic() + _ALONE_S
        for batch in batches:
            alive()
            yield encode_batch(batch, formatter)
            if num_workers > 1 and time.monotonic() > until:
                break
        with Workers(formatter, num_workers, alive) as workers:
            yield from workers.encode(batches)
    finally:
        os.environ[_THREADS] = before


# ---------------------------------------------------------------------- workers


@dataclass
class _Worker:
    process: Any
    connection: Connection
    batches: deque[tuple[int, Batch]] = field(default_factory=deque)  # sent, not answered; in order


class Workers:
    """Processes that are forked when the first batch comes and end with this one, however it ends.

    Forked, not started anew: a tokenizer of the user's own code cannot be pickled, and nothing is imported again. They
    touch neither the device nor a process group, and use no threads of Rust, which do not survive a fork.
    """

    def __init__(self, formatter: Formatter, num_workers: int, alive: Callable[[], None]) -> None:
        self._formatter, self._num_workers, self._alive = formatter, num_workers, alive
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # one that waits for work ends by itself
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_END_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def encode(self, batches: Iterator[Batch]) -> Iterator[EncodedBatch]:
        """Yields in the order of the batches. What waits for an earlier one is bounded."""
        done: dict[int, EncodedBatch] = {}
        number = following = 0
        is_end = False
        while True:
            while not is_end and number < following + 2 * _AHEAD * self._num_workers:
                worker = self._free()
                if worker is None:
                    break
                batch = next(batches, None)
                if batch is None:
                    is_end = True
                    break
                worker.batches.append((number, batch))
                self._send(worker, batch)
                number += 1
            while following in done:
                yield done.pop(following)
                following += 1
            if is_end and following == number:
                return
            self._alive()
            done |= self._answers()

    def _free(self) -> _Worker | None:
        """The worker with the least to do; a new one where all are busy. None where none may get more."""
        least = min(self._workers, key=lambda worker: len(worker.batches), default=None)
        if len(self._workers) < self._num_workers and (least is None or least.batches):
            least = self._start()
        return least if least is not None and len(least.batches) < _AHEAD else None

    def _start(self) -> _Worker:
        context = get_context("fork")
        ours, theirs = context.Pipe()
        others = [worker.connection for worker in self._workers]
        process = context.Process(
            target=_work, args=(theirs, [ours, *others], self._formatter, os.getpid()), daemon=True, name="tokenise"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: threads do not survive a fork
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _send(self, worker: _Worker, batch: Batch) -> None:
        try:
            worker.connection.send(batch)
        except OSError as error:
            raise self._death(worker) from error

    def _answers(self) -> dict[int, EncodedBatch]:
        found = {}
        by_connection = {worker.connection: worker for worker in self._workers if worker.batches}
        for ready in wait(list(by_connection), _POLL_S):
            worker = by_connection[ready]  # type: ignore[index]
            try:
                answer = worker.connection.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            number, _ = worker.batches.popleft()
            if isinstance(answer, ConfigError):
                raise ConfigError(answer.problems)  # its text does not survive being pickled
            if isinstance(answer, BaseException):
                raise answer
            found[number] = answer
        return found

    def _death(self, worker: _Worker) -> DataError:
        worker.process.join(_END_S)
        code = worker.process.exitcode
        how = f"ended with {code}" if code is None or code >= 0 else f"was killed by {signal.Signals(-code).name}"
        out_of_memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        rows = worker.batches[0][1].rows() if worker.batches else []
        place = f", at work on {rows[0].where} to {rows[-1].where}" if rows else ""
        return DataError(
            f"tokenising: worker process {worker.process.pid} {how}{out_of_memory}{place}. Nothing of it is kept; run "
            f"the same command again. To use fewer workers than {self._num_workers}: data.dataset_num_proc=1"
        )


class WorkerError(LauncherError):
    """A worker failed in a way that nobody expected; holds its traceback."""


def _work(connection: Connection, others: Sequence[Connection], formatter: Formatter, parent: int) -> None:
    """A worker: encodes what comes until the connection is closed."""
    die_with_parent(expected_parent=parent)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too, but the parent decides
    os.environ[_THREADS] = "false"
    for other in others:  # else a worker would not see the end of the parent, nor the parent that of a worker
        other.close()
    batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()

    def receive() -> None:  # always: the parent must never wait for us while we wait for it
        with contextlib.suppress(EOFError, OSError):
            while True:
                batches.put(connection.recv())
        batches.put(None)

    threading.Thread(target=receive, daemon=True).start()
    while (batch := batches.get()) is not None:
        answer: EncodedBatch | BaseException
        try:
            answer = encode_batch(batch, formatter)
        except LauncherError as error:
            answer = error
        except Exception as error:
            answer = WorkerError(f"tokenising failed: {error}\n{traceback.format_exc()}")
        try:
            connection.send(answer)
        except OSError:
            break
    os._exit(0)
