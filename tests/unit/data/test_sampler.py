"""Property: step k takes samples [k·B, (k+1)·B) of the epoch permutations, however they are split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from launcher.data import StepSampler, split_step
from launcher.data import sampler as sampler_module

PINNED = [[4, 8, 1, 9, 3, 6, 0, 7, 2, 5], [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]]  # epochs 0 and 1 of seed 42
PINNED_COMPUTED = [8, 3, 2, 1, 0, 4, 7, 5, 6, 9]
SIZES = list(itertools.product((1, 2, 7, 30), (1, 3, 8, 64)))  # rows, samples per step


def settings() -> Iterator[tuple[int, int, int]]:
    """(samples of a step, processes, samples per micro-batch), fixed draws over a wide range."""
    draw = np.random.default_rng(0)
    yield from ((1, 8, 8), (64, 1, 64), (64, 3, 5), (5, 5, 1))
    for _ in range(300):
        yield int(draw.integers(1, 100)), int(draw.integers(1, 17)), int(draw.integers(1, 12))


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
def test_steps_are_the_concatenated_permutations(num_rows: int, batch: int) -> None:
    sampler = StepSampler(num_rows, batch, seed=3)
    num_steps = sampler.total_steps(3.0) + 1
    samples = np.concatenate([sampler.rows_of_step(step) for step in range(num_steps)])
    assert len(samples) == num_steps * batch
    for epoch in range(3):
        assert sorted(samples[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_a_step_depends_on_nothing_but_its_number() -> None:
    backwards, forwards = StepSampler(50, 8, seed=1), StepSampler(50, 8, seed=1)
    wanted = [backwards.rows_of_step(step).tolist() for step in reversed(range(40))]
    assert wanted[::-1] == [forwards.rows_of_step(step).tolist() for step in range(40)]


def test_order_is_pinned() -> None:
    """A resume after an upgrade of numpy has to find the same order."""
    sampler = StepSampler(10, 10, seed=42)
    assert sampler.rows_of_step(0).tolist() == PINNED[0]
    assert sampler.rows_of_step(1).tolist() == PINNED[1]
    assert StepSampler(10, 10, seed=43).rows_of_step(0).tolist() != PINNED[0]


def test_every_process_and_micro_batch_together_make_the_step() -> None:
    for batch, world_size, per_device in settings():
        rows = np.random.default_rng(batch).permutation(batch)
        split = [split_step(rows, rank, world_size, per_device) for rank in range(world_size)]
        together = [row for micro_batches in split for ids in micro_batches for row in ids.tolist()]
        assert together == rows.tolist()  # every sample once, the same order whatever the number of processes
        assert {len(micro_batches) for micro_batches in split} == {-(-batch // (world_size * per_device))}
        sizes = [len(ids) for micro_batches in split for ids in micro_batches]
        assert max(sizes) <= per_device
        own = [sum(map(len, micro_batches)) for micro_batches in split]
        assert max(own) - min(own) <= 1


def test_missing_slots_are_empty() -> None:
    split = [split_step(np.arange(3), rank, 5, 2) for rank in range(5)]
    assert [[ids.tolist() for ids in micro_batches] for micro_batches in split] == [[[0]], [[1]], [[2]], [[]], [[]]]


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs", "steps"),
    [
        (10, 4, 1.0, 3),
        (10, 5, 1.0, 2),
        (10, 11, 1.1, 1),
        (10, 7, 0.7, 1),
        (3, 1, 0.1, 1),
        (10, 4, 2.5, 7),
        (1, 8, 3, 1),
    ],
)
def test_total_steps_is_the_exact_ceiling(num_rows: int, batch: int, epochs: float, steps: int) -> None:
    assert StepSampler(num_rows, batch, seed=0).total_steps(epochs) == steps


def test_epoch_after() -> None:
    assert StepSampler(10, 4, seed=0).epoch_after(5) == 2.0


def test_memory_is_bounded_over_many_epochs() -> None:
    sampler = StepSampler(4, 8, seed=0)
    for step in range(100):
        sampler.rows_of_step(step)
    assert len(sampler._permutations) <= 2


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_computed_order_is_a_permutation(num_rows: int) -> None:
    for epoch in range(3):
        found = sampler_module.shuffled(np.arange(num_rows), num_rows, 5, epoch)
        assert sorted(found.tolist()) == list(range(num_rows))
    assert num_rows < 16 or sampler_module.shuffled(np.arange(num_rows), num_rows, 5, 3).tolist() != found.tolist()


def test_computed_order_looks_random() -> None:
    """Neighbours go far apart, and where a row goes says nothing about where the next one goes."""
    num = 100_000
    found = sampler_module.shuffled(np.arange(num), num, 1, 0).astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02 and abs(np.corrcoef(found, np.arange(num))[0, 1]) < 0.02
    assert abs(np.abs(np.diff(found)).mean() / num - 1 / 3) < 0.01


def test_computed_order_is_pinned_and_needs_no_memory_for_a_billion_rows() -> None:
    sampler = StepSampler(10**9, 8, seed=42)
    assert sampler.order == "computed" and StepSampler(10**6, 8, seed=42).order == "sorted"
    first, late = sampler.rows_of_step(0), sampler.rows_of_step(125_000_000 + 3)
    assert len({*first.tolist(), *late.tolist()}) == 16 and not sampler._permutations
    small = StepSampler(10, 10, seed=42, order="computed")
    assert small.rows_of_step(0).tolist() == PINNED_COMPUTED
    assert StepSampler(10, 25, seed=42, order="computed").rows_of_step(0)[:10].tolist() == PINNED_COMPUTED
