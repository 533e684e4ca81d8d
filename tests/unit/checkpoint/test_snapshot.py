"""The snapshot is of the moment of the save, though most of it is copied beside the next forward and backward."""

from __future__ import annotations

import threading

import pytest
import torch

from launcher.base.stored import StoredTensor
from launcher.checkpoint import snapshot
from launcher.checkpoint.layout import TensorSpec, plan_files
from launcher.checkpoint.segments import TrainedState
from launcher.checkpoint.snapshot import Copy, HostCopies, SnapshotPlan, plan_snapshot

_NUMEL = 3 * 2**20 + 5  # several pieces


def _plan_of(tensor: torch.Tensor) -> SnapshotPlan:
    files = plan_files("model", [TensorSpec("w", "F32", (tensor.numel(),))], {})
    plan = SnapshotPlan(files)
    plan.add(lambda: tensor, 0, tensor.numel(), torch.float32, files[0].path, files[0].places[0].offset)
    return plan


def _copied(plan: SnapshotPlan, buffer: torch.Tensor) -> torch.Tensor:
    return buffer[plan.copies[0].offset : plan.copies[0].end].view(torch.float32)


@pytest.mark.parametrize("is_starved", [False, True])
def test_host_copies_are_whole_when_finished_with_and_without_a_spare_core(is_starved: bool) -> None:
    copies, tensor = HostCopies(), torch.arange(_NUMEL, dtype=torch.float32)
    plan = _plan_of(tensor)
    gate = threading.Event()
    for repetition in range(3):
        buffer = torch.zeros(plan.buffer_bytes, dtype=torch.uint8)
        if is_starved:
            gate.clear()
            copies._pool.submit(gate.wait)
        tensor += repetition
        seen: list[torch.Tensor] = []
        is_told = threading.Event()

        def tell(
            buffer: torch.Tensor = buffer, seen: list[torch.Tensor] = seen, told: threading.Event = is_told
        ) -> None:
            seen.append(_copied(plan, buffer).clone())
            told.set()

        copies.begin(plan.copies, buffer, tell)
        if is_starved:
            threading.Timer(0.05, gate.set).start()
        copies.finish()
        assert torch.equal(_copied(plan, buffer), tensor)
        assert is_told.wait(10)
        assert len(seen) == 1 and torch.equal(seen[0], tensor)
    copies.finish()  # nothing to do


def test_a_copy_that_fails_beside_the_training_is_not_lost() -> None:
    copies = HostCopies()
    copies._left.append((torch.zeros(3), torch.zeros(2)))
    told: list[None] = []
    copies.begin([], torch.zeros(0, dtype=torch.uint8), lambda: told.append(None))
    while copies._left:
        pass
    with pytest.raises(RuntimeError):
        copies.finish()
    assert told == []


def test_what_a_forward_pass_may_change_is_copied_first() -> None:
    module = torch.nn.BatchNorm1d(4)
    state = TrainedState((), (), torch.optim.SGD(module.parameters()), "whole")
    stored = {name: (StoredTensor(name, tuple(buffer.shape), 0),) for name, buffer in module.named_buffers()}
    plan = plan_snapshot(
        state, module, dtype=torch.float32, weights_stem="model", stored=stored,
        only_model=True, rank=0,
    )  # fmt: skip
    live: list[Copy] = plan.copies[: plan.num_live]
    assert {copy.source().data_ptr() for copy in live} == {buffer.data_ptr() for buffer in module.buffers()}
    buffer = torch.zeros(plan.buffer_bytes, dtype=torch.uint8)
    snapshot.take(live, buffer)
    assert int(buffer.count_nonzero()) > 0
