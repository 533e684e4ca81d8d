"""The processes of a run and the few collectives the loop needs, on CPU (gloo), away from the gradients' group."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.base.errors import LauncherError

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Tokenising a large data set may keep the others waiting for hours; hangs in training are the watchdog's business."""


def ask_main(question: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What the main process decides from every process's `question`; before there is a process group. Collective.

    Args:
        decide: called on the main process, with the questions by rank. Its LauncherError reaches every process.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return decide([question])
    store = _store()
    store.set(f"question-{rank}", pickle.dumps(question))
    if rank:
        answer, error = pickle.loads(store.get("answer"))
    else:
        answer, error = None, None
        questions = [pickle.loads(store.get(f"question-{other}")) for other in range(world_size)]
        try:
            answer = decide(questions)
        except LauncherError as raised:
            error = raised
        store.set("answer", pickle.dumps((answer, error)))
    if error is not None:
        raise error
    return answer


@functools.cache
def _store() -> Any:
    """Where the processes meet. Kept: the process group uses the same server, which is gone with its last store."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return PrefixStore("launcher", store)


class Processes:
    """Who I am among the processes, and how we agree. Without torch.distributed: one process, no communication."""

    def __init__(self) -> None:
        self._group: Any = None
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            # A new group does not inherit the timeout: gloo's own is half an hour.
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_one_machine(self) -> bool:
        """Whether all of them are known to be on one."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) >= self.world_size

    @property
    def is_local_main(self) -> bool:
        return self.local_rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Adds up each value over all processes (float64). Collective."""
        return self.begin_sum(values)()

    def begin_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """As `sum`, but the other processes are waited for in what it returns. Collective; no other may be between."""
        if self.world_size == 1:
            return lambda: list(values)
        # Gathered and added up here: half the hops of gloo's all-reduce, which now and then stands still for 4 ms.
        mine = torch.tensor(values, dtype=torch.float64)
        each = torch.empty(self.world_size, len(values), dtype=torch.float64)
        work = dist.all_gather(list(each.unbind()), mine, group=self._group, async_op=True)

        def wait() -> list[float]:
            work.wait()
            return list(each.sum(0).tolist())

        return wait

    def barrier(self) -> None:
        """Collective."""
        self.sum([0.0])

    def broadcast(self, value: Any) -> Any:
        """The main process's value. Collective. Values are plain data made by ourselves."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on the main process; its result, or its LauncherError, reaches every process. Collective."""
        result: Any = None
        error: LauncherError | None = None
        if self.is_main:
            try:
                result = action()
            except LauncherError as raised:
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
