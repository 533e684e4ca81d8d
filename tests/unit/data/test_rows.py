"""Packing and batches: packed rows must not see each other, padding and empty slots must not count."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.base.targets import targets_of
from launcher.data import Data, TokenRows, collate
from launcher.data.packing import PackPlan, Packs, Placements
from launcher.data.rows import rounded

TEXTS = ["a", "bcd" * 3, "efg hij" * 2, "k", "lmno" * 3, "pq", "rstuvw" * 2, "xyz"]


@pytest.fixture
def make_rows(make_data: Callable[..., Data], write_rows: Callable[..., str]) -> Callable[..., TokenRows]:
    file = write_rows([{"text": text} for text in TEXTS])
    return lambda **settings: make_data(train_files=[file], max_length=24, **settings).train


def tiny_llama(attn_implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attn_implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def all_ids(rows: TokenRows) -> np.ndarray:
    return np.arange(len(rows))


# ---------------------------------------------------------------------- pack


def test_pack_holds_every_row_once_and_whole() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        max_length = int(draw.integers(1, 200))
        lengths = draw.integers(1, max_length + 1, size=int(draw.integers(1, 300)))
        packs = Packs(lengths, max_length)
        order, bounds = packs.order, packs.bounds
        assert sorted(order.tolist()) == list(range(len(lengths)))
        sums = np.add.reduceat(lengths[order], bounds[:-1])
        assert sums.max() <= max_length
        half_empty = (2 * sums <= max_length).sum()
        assert half_empty <= 1  # two half-empty packs would have been one


def test_pack_is_best_fit_decreasing() -> None:
    packs = Packs(np.array([3, 7, 5, 2, 3]), 10)
    assert [packs.rows_of(np.array([i]))[0].tolist() for i in range(len(packs))] == [[1, 0], [2, 4, 3]]


# ---------------------------------------------------------------------- collate


def test_collate_pads_on_the_right(make_rows: Callable[..., TokenRows]) -> None:
    batch = collate(make_rows(), np.array([0, 5, 7]), 256)
    a, end = ord("a"), 257
    assert batch["input_ids"].tolist() == [
        [a, end, 256, 256],
        [ord("p"), ord("q"), end, 256],
        [ord("x"), ord("y"), ord("z"), end],
    ]
    assert batch["labels"].tolist() == [
        [-100, end, -100, -100],
        [-100, ord("q"), end, -100],
        [-100, ord("y"), ord("z"), end],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_labelled_tokens_are_those_with_a_label(make_rows: Callable[..., TokenRows]) -> None:
    for packing in (False, True):
        rows = make_rows(packing=packing)
        for ids in (all_ids(rows), all_ids(rows)[:1], np.array([], dtype=np.int64)):
            batch = collate(rows, ids, 256)
            assert rows.num_labelled_tokens(ids) == int((batch["labels"] != -100).sum())
        assert rows.num_labelled_tokens(all_ids(rows)) == sum(map(len, TEXTS))  # EOS counts, the first token does not


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_empty_slot_bears_no_loss(make_rows: Callable[..., TokenRows], attn_implementation: str, packing: bool) -> None:
    batch = collate(make_rows(packing=packing), np.array([], dtype=np.int64), 256)
    assert batch["input_ids"].shape[0] == 1
    assert (batch["labels"] == -100).all()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.isfinite(tiny_llama(attn_implementation)(**inputs).logits).all()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_flat", [False, True])
def test_packed_rows_do_not_see_each_other(
    make_rows: Callable[..., TokenRows], attn_implementation: str, is_flat: bool
) -> None:
    """The logits of every row equal those it has alone, whatever it is packed with."""
    model, rows = tiny_llama(attn_implementation), make_rows(packing=True)
    rows.is_flat = is_flat
    assert 1 < len(rows) < len(TEXTS)
    batch = collate(rows, all_ids(rows), 256)
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape[0] == (1 if is_flat else len(rows))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for i in range(len(rows)):
            start = 0
            line = 0 if is_flat else i
            if is_flat:
                start = sum(len(tokens) for k in range(i) for tokens, _ in rows.segments(k))
            for tokens, _ in rows.segments(i):
                alone = model(input_ids=torch.tensor(tokens.astype(np.int64))[None]).logits[0]
                together = logits[line, start : start + len(tokens)]
                torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
                start += len(tokens)


def test_packed_loss_is_that_of_the_rows(make_rows: Callable[..., TokenRows]) -> None:
    model = tiny_llama("sdpa")

    def loss(rows: TokenRows) -> float:
        batch: dict[str, Any] = collate(rows, all_ids(rows), 256)
        return model(**batch, use_cache=False).loss.item()

    assert loss(make_rows(packing=True)) == pytest.approx(loss(make_rows(packing=False)), rel=1e-5)


def packed_one_by_one(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """The rule that runs were packed by from the first version on: their checkpoints must find the same packs."""
    packs: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(max_length + 1)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        space = next((s for s in range(length, max_length + 1) if with_space[s]), None)
        if space is None:
            space, chosen = max_length, len(packs)
            packs.append([])
        else:
            chosen = with_space[space].pop()
        packs[chosen].append(row)
        if space > length:
            with_space[space - length].append(chosen)
    return packs


def test_pack_is_the_same_as_one_row_after_the_other() -> None:
    draw = np.random.default_rng(1)
    for i in range(200):
        max_length = int(draw.integers(1, 60)) if i < 190 else 70_000
        longest = max(1, max_length // int(draw.integers(1, 5)))
        lengths = draw.integers(1, longest + 1, size=int(draw.integers(1, 400)))
        packs = Packs(lengths, max_length)
        order, bounds = packs.order, packs.bounds
        found = [order[a:b].tolist() for a, b in itertools.pairwise(bounds)]
        if max_length < 60:
            assert found == packed_one_by_one(lengths, max_length)
        assert sorted(order.tolist()) == list(range(len(lengths)))


class Pieces:
    """Lengths that are given out in pieces, and counted."""

    def __init__(self, lengths: np.ndarray, num_rows: int | None = None) -> None:
        self._lengths, self._num_rows = lengths, num_rows or len(lengths)
        self.num_given = 0

    def __len__(self) -> int:
        return self._num_rows

    def piece(self, start: int, end: int) -> np.ndarray:
        """Beyond the end they begin again."""
        self.num_given += end - start
        return np.take(self._lengths, np.arange(start, end), mode="wrap")


@pytest.mark.parametrize("block_rows", [4, 64])
def test_computed_packs_are_those_of_the_arrays(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr("launcher.data.packing._MIN_BLOCK_ROWS", block_rows)
    monkeypatch.setattr("launcher.data.packing._PIECE_ROWS", 256)
    draw = np.random.default_rng(2)
    for _ in range(60):
        max_length = int(draw.integers(1, 60))
        longest = max(1, max_length // int(draw.integers(1, 5)))
        lengths = draw.integers(1, longest + 1, size=int(draw.integers(1, 1000)))
        packs, plan = Packs(lengths, max_length), PackPlan(Pieces(lengths), max_length)
        assert len(packs) == len(plan) and plan.num_tokens == lengths.sum()
        for ids in (draw.permutation(len(packs)), np.zeros(0, dtype=np.int64), np.array([len(packs) - 1] * 2)):
            for found, expected in zip(plan.rows_of(ids), packs.rows_of(ids), strict=True):
                assert found.tolist() == expected.tolist()


def test_packs_follow_from_counts_when_there_are_a_billion_rows() -> None:
    """2 GB and 60 s are the limits; as much work and memory is needed for ten times as many rows."""
    lengths = np.minimum(1024, np.random.default_rng(0).lognormal(5.5, 1.0, 1 << 16).astype(np.int64) + 1)
    counts = np.bincount(lengths)
    small, large = (Placements(counts * factor, 1024) for factor in (15, 15_259))  # a million, a billion
    assert large.num_rows > 10**9
    assert len(large._at) < 1.1 * len(small._at) < 10_000
    places, of_length, num = large.rows_of(np.array([0, large.num_packs // 2, large.num_packs - 1]))
    assert np.add.reduceat(of_length, np.cumsum(num) - num).max() <= 1024 and places.max() < large.num_rows


def test_plan_of_packs_is_small_and_finds_a_row_in_one_block() -> None:
    lengths = np.minimum(512, np.random.default_rng(0).lognormal(5.0, 1.0, 1 << 16).astype(np.int64) + 1)
    pieces = Pieces(lengths, 5_000_000)
    tracemalloc.start()
    plan = PackPlan(pieces, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces.num_given == len(pieces)  # every length is read once
    assert peak < 60e6 < 16 * len(pieces)
    pieces.num_given = 0
    _, counts = plan.rows_of(np.arange(100, 200))
    assert pieces.num_given <= counts.sum() * 4096


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 8}, "phi3": {"pad_token_id": 0}, "gpt2": {}, "mistral": {"sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loss_and_gradients_are_the_same_when_rows_are_packed(
    make_rows: Callable[..., TokenRows], model_type: str, attention: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        **ARCHITECTURES[model_type],
    )  # fmt: skip
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = config.attention_dropout = 0.0
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()

    def sums(rows: TokenRows) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        batch = collate(rows, all_ids(rows), 256)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (apart, apart_grads), (packed, packed_grads) = sums(make_rows()), sums(make_rows(packing=True))
    assert packed == pytest.approx(apart, rel=1e-5)
    assert len(apart_grads) == len(packed_grads) > 5
    scale = max(float(grad.abs().max()) for grad in apart_grads)
    for a, b in zip(apart_grads, packed_grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * scale


# ------------------------------------------------------------------- targets


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1), (5, 7), (3, 64)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_targets_are_the_labels_of_the_next_position(shape: tuple[int, int], share: float) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 100, shape)
    labels[draw.random(shape) >= share] = -100
    found = targets_of(torch.from_numpy(labels))
    wanted = [(b * shape[1] + t - 1, labels[b, t]) for b in range(shape[0]) for t in range(1, shape[1])]
    assert list(zip(found.positions.tolist(), found.tokens.tolist(), strict=True)) == [
        (place, token) for place, token in wanted if token != -100
    ], "the first of a row has no position before it, whatever its label"
    assert found.positions.dtype == found.tokens.dtype == torch.int64


# ------------------------------------------------------------------- lengths


def test_flat_batches_have_few_lengths_and_little_padding() -> None:
    lengths = range(1, 8193)
    found = [rounded(length, 4096) for length in lengths]
    assert found[:255] == list(lengths[:255])
    assert all(0 <= padded - length <= length / 32 for padded, length in zip(found, lengths, strict=True))
    assert all(padded % 8 == 0 for padded in found[255:])
    assert len(set(found[1023:2047])) <= 33 and [rounded(n, 512) for n in (1986, 2028, 2048, 2049)] == [
        2048,
        2048,
        2048,
        2112,
    ]


def test_padding_is_no_longer_than_the_longest_row() -> None:
    """A table of 128 positions has no 155th, and rotary positions that change with the length change for all rows."""
    assert [rounded(9829, longest) for longest in (512, 155, 154, 50, 2)] == [9984, 9984, 9856, 9856, 9829]


def test_a_rounded_batch_ends_with_a_row_of_padding(
    make_rows: Callable[..., TokenRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.data.rows.rounded", lambda length, longest: length + 5)
    rows = make_rows()
    rows.is_flat = True
    plain = collate(rows, np.array([0, 5, 7]), 256)
    rows.is_rounded = True
    batch, size = collate(rows, np.array([0, 5, 7]), 256), plain["input_ids"].shape[1]
    assert all(torch.equal(batch[name][:, :size], plain[name]) for name in ("input_ids", "labels", "position_ids"))
    assert [batch[name][0, size:].tolist() for name in ("input_ids", "labels", "position_ids")] == [
        [256] * 5, [-100] * 5, list(range(5))
    ]  # fmt: skip
    assert batch["cu_seq_lens_q"].tolist() == [*plain["cu_seq_lens_q"].tolist(), size + 5]
