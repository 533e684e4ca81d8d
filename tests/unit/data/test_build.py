"""Sources, bad rows, splits, mixtures, notices and the fingerprint."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.base.errors import ConfigError, DataError
from launcher.config.compose import compose
from launcher.config.settings import DataConfig, RunConfig
from launcher.data import Data, TokenRows, build_data, collate

from .conftest import chat

Make = Callable[..., Data]
Write = Callable[..., str]


def texts(rows: TokenRows | None, tokenizer: Any) -> list[str]:
    assert rows is not None
    return [tokenizer.decode(rows.segments(i)[0][0][:-1]) for i in range(len(rows))]


def numbered(start: int, end: int) -> list[dict[str, str]]:
    return [{"text": f"row {i}"} for i in range(start, end)]


class Generator:
    """A generator as a user writes one."""

    def __init__(self, num: int, suffix: Any = "") -> None:
        self.num, self.suffix = num, suffix

    def __call__(self, split: str) -> Iterator[Any]:
        return ({"text": f"{split} {i}{self.suffix}"} for i in range(self.num))


def bad_generator(split: str) -> list[Any]:
    return [{"text": "ok"}, "not a row"]


# ---------------------------------------------------------------------- sources


def test_files_when_json_lines_parquet_array_and_gzip(
    make_data: Make, write_rows: Write, tmp_path: Path, tokenizer: Any
) -> None:
    lines = write_rows([*numbered(0, 2), "", *numbered(2, 3)])
    pq.write_table(pa.Table.from_pylist(numbered(3, 5)), tmp_path / "rows.parquet")
    (tmp_path / "array.json").write_text(json.dumps(numbered(5, 6), indent=1))
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "row 6"}))
    files = [lines, str(tmp_path / "*.parquet"), str(tmp_path / "array.json"), str(tmp_path / "more.jsonl.gz")]
    data = make_data(train_files=files)
    assert texts(data.train, tokenizer) == [f"row {i}" for i in range(7)]
    assert data.eval is None
    assert data.notices == []


def test_parquet_when_messages_are_nested_with_nulls(make_data: Make, tmp_path: Path, tokenizer: Any) -> None:
    rows = [chat("q", "a"), chat("q2", "a2")]
    rows[0]["messages"][1]["tool_calls"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = make_data(train_files=[str(tmp_path / "rows.parquet")])
    assert texts(data.train, tokenizer)[1] == "<|user|>q2<|end|><|assistant|>a2"


def test_parquet_when_damaged(make_data: Make, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(numbered(0, 100)), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        make_data(train_files=[str(tmp_path / "rows.parquet")])


def test_hub_data_set_when_saved_to_a_folder(make_data: Make, tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": numbered(0, 4), "test": numbered(4, 6)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(tmp_path / "saved")
    data = make_data(dataset_name=str(tmp_path / "saved"), eval_split="test")
    assert texts(data.train, tokenizer) == [f"row {i}" for i in range(4)]
    assert texts(data.eval, tokenizer) == ["row 4", "row 5"]
    assert list(data.eval_rows) == splits["test"]


def test_hub_data_set_when_saved_without_splits(make_data: Make, tmp_path: Path, tokenizer: Any) -> None:
    """It is the training data; never the evaluation of another name, too."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(numbered(0, 4)).save_to_disk(tmp_path / "saved")
    assert texts(make_data(dataset_name=str(tmp_path / "saved")).train, tokenizer) == [f"row {i}" for i in range(4)]
    with pytest.raises(DataError, match="it holds one data set and no split 'test'"):
        make_data(dataset_name=str(tmp_path / "saved"), eval_split="test")
    datasets.Dataset.from_list(numbered(0, 4), split="part").save_to_disk(tmp_path / "part")
    assert len(make_data(dataset_name=str(tmp_path / "part"), train_split="part").train) == 4


def test_hub_data_set_when_a_folder_of_files(
    make_data: Make, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered(0, 3)))
    data = make_data(dataset_name=str(tmp_path / "folder"), eval_split=0.34)
    assert sorted(texts(data.train, tokenizer) + texts(data.eval, tokenizer)) == ["row 0", "row 1", "row 2"]
    with pytest.raises(DataError, match=r"data\.dataset_name=.*folder\[validation\] cannot be loaded"):
        make_data(dataset_name=str(tmp_path / "folder"), eval_split="validation")


def test_generator(make_data: Make, tokenizer: Any) -> None:
    data = make_data(generator={"_target_": f"{__name__}.Generator", "num": 3})
    assert texts(data.train, tokenizer) == ["train 0", "train 1", "train 2"]
    assert list(data.eval_rows) == [{"text": f"eval {i}"} for i in range(3)]
    other = make_data(generator={"_target_": f"{__name__}.Generator", "num": 3, "suffix": "!"})
    assert texts(other.train, tokenizer)[0] == "train 0!"


def test_generator_when_rows_are_no_dicts(make_data: Make) -> None:
    spec = {"_target_": f"{__name__}.bad_generator", "_partial_": True}
    with pytest.raises(DataError, match=r"bad_generator\[train\]:2: must be a dict \(got str\)"):
        make_data(generator=spec)


def test_generator_when_it_cannot_be_made(make_data: Make) -> None:
    with pytest.raises(DataError, match=r"data\.generator=.*cannot be made"):
        make_data(generator={"_target_": f"{__name__}.Generator", "wrong": 1})


# ---------------------------------------------------------------------- bad rows

BAD_ROWS = [
    {"text": "fine"},
    "{not json",
    {"text": 5},
    {"text": ""},
    {"messages": [{"role": "robot", "content": "x"}]},
    [1, 2],
    {"text": "fine too"},
]


def test_bad_rows_are_all_named_with_file_and_line(make_data: Make, write_rows: Write) -> None:
    """Of every file, evaluation included, in one message."""
    train, held_out = write_rows(BAD_ROWS), write_rows(["[]"], "eval.jsonl")
    with pytest.raises(DataError) as error:
        make_data(train_files=[train], eval_files=[held_out])
    message = str(error.value)
    for line in (2, 3, 4, 5, 6):
        assert f"{train}:{line}: " in message
    assert f"{train}:1:" not in message
    assert f"{train}:7:" not in message
    assert "5 of 7 rows" in message
    assert f"{held_out}:1: must be a JSON object" in message
    assert "data.on_bad_row=skip" in message


def test_bad_rows_when_skipped_are_counted(make_data: Make, write_rows: Write, tokenizer: Any) -> None:
    settings = {"train_files": [write_rows(BAD_ROWS)], "on_bad_row": "skip"}
    for _ in ("built", "cached"):
        data = make_data(**settings)
        assert texts(data.train, tokenizer) == ["fine", "fine too"]
        (notice,) = data.notices
        assert "5 of 7 rows" in notice
        assert "rows.jsonl:2: invalid JSON" in notice


def test_bad_rows_when_many_are_capped(make_data: Make, write_rows: Write) -> None:
    with pytest.raises(DataError, match=r"50 of 50 rows(?s:.*)… and 30 more") as error:
        make_data(train_files=[write_rows(["{"] * 50)])
    assert str(error.value).count("invalid JSON") == 20


@pytest.mark.parametrize("rows", [[], ["{"]])
def test_no_usable_row_is_an_error(make_data: Make, write_rows: Write, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="no row is left to use"):
        make_data(train_files=[write_rows(rows)], on_bad_row="skip")


def test_line_that_is_no_utf8_is_a_bad_row(make_data: Make, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: invalid JSON"):
        make_data(train_files=[str(tmp_path / "rows.jsonl")])


# ---------------------------------------------------------------------- truncation


def test_what_has_no_effect_is_told_once(make_data: Make, write_rows: Write) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2, "note": "x"}, {"text": "c", "id": 3}]
    (told,) = [n for n in make_data(train_files=[write_rows(rows)]).notices if "not used" in n]
    assert told.endswith("rows.jsonl: not used: id, note (1 of 3 rows)")
    many = [{"text": "a", f"key{i}": 1} for i in range(1000)]
    (told,) = [n for n in make_data(train_files=[write_rows(many, "many.jsonl")]).notices if "not used" in n]
    assert told.count("key") == 10 and told.endswith("…")


def test_truncation_is_reported_and_rows_without_labels_are_left_out(make_data: Make, write_rows: Write) -> None:
    rows = [
        {"prompt": "1", "completion": "2"},
        {"prompt": "1", "completion": "2" * 50},
        {"prompt": "1" * 50, "completion": "2"},
    ]
    data = make_data(train_files=[write_rows(rows)], max_length=10)
    assert len(data.train) == 2
    cut, left_out = data.notices
    assert "2 of 3 rows were cut to data.max_length=10 tokens and lost their end with it" in cut
    assert "1 of 3 rows have no token to learn from" in left_out
    assert collate(data.train, np.array([1]), 0)["input_ids"].shape == (1, 10)


# ---------------------------------------------------------------------- held-out rows


def test_eval_fraction_is_seeded_and_disjoint(make_data: Make, write_rows: Write, tokenizer: Any) -> None:
    file = write_rows(numbered(0, 50))
    data, again, other = (make_data(train_files=[file], eval_split=0.1, seed=seed) for seed in (1, 1, 2))
    held_out = texts(data.eval, tokenizer)
    assert len(held_out) == 5
    assert sorted(held_out + texts(data.train, tokenizer)) == sorted(f"row {i}" for i in range(50))
    assert [row["text"] for row in data.eval_rows] == held_out == texts(again.eval, tokenizer)
    assert held_out != texts(other.eval, tokenizer)


def test_eval_rows_when_bad_rows_were_skipped(make_data: Make, write_rows: Write, tokenizer: Any) -> None:
    data = make_data(
        train_files=[write_rows(numbered(0, 2))], eval_files=[write_rows(BAD_ROWS, "eval.jsonl")], on_bad_row="skip"
    )
    assert [row["text"] for row in data.eval_rows] == texts(data.eval, tokenizer) == ["fine", "fine too"]
    assert data.eval_rows[1:] == [{"text": "fine too"}]


def test_eval_split_when_settings_contradict(make_data: Make, write_rows: Write) -> None:
    file = write_rows(numbered(0, 2))
    with pytest.raises(ConfigError, match=r"data\.eval_split=test names a split"):
        make_data(train_files=[file], eval_split="test")
    with pytest.raises(ConfigError, match=r"data\.eval_files and data\.eval_split"):
        make_data(train_files=[file], eval_files=[file], eval_split=0.5)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        make_data(train_files=[file], eval_split=0.9)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_column_that_no_row_has_is_told_once(make_data: Make, write_rows: Write, on_bad_row: str) -> None:
    file = write_rows(numbered(0, 50))
    with pytest.raises(DataError) as error:
        make_data(train_files=[file], columns={"prompt": "zzz", "completion": "text"}, on_bad_row=on_bad_row)
    assert str(error.value).count("zzz") == 1 and "on_bad_row" not in str(error.value)
    assert "data.columns.prompt names it; it has text" in str(error.value)
    some = write_rows([{"body": "x"}, {"text": "y"}], "some.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used"):
        make_data(train_files=[some], columns={"text": "body"})


def test_evaluation_is_not_packed(make_data: Make, write_rows: Write) -> None:
    data = make_data(train_files=[write_rows(numbered(0, 20))], eval_split=0.5, packing=True)
    assert data.eval is not None
    assert (data.train.is_packed, data.eval.is_packed) == (True, False)
    assert len(data.eval) == len(data.eval_rows) == 10
    assert any(notice.startswith("packing: 10 rows in 1 samples") for notice in data.notices)


# ---------------------------------------------------------------------- mixtures


def test_sources_when_weighted(make_data: Make, write_rows: Write, tokenizer: Any) -> None:
    """As many samples as rows, shared out 3 to 1, nothing held out in training."""
    sources = [
        {"train_files": [write_rows([{"text": f"a{i}"} for i in range(20)], "a.jsonl")], "weight": 3},
        {"train_files": write_rows([{"text": f"b{i}"} for i in range(60)], "b.jsonl")},
    ]
    data, again, other = (make_data(sources=sources, eval_split=0.1, seed=seed) for seed in (1, 1, 2))
    mixed, held_out = Counter(texts(data.train, tokenizer)), set(texts(data.eval, tokenizer))
    assert sum(count for text, count in mixed.items() if text[0] == "a") == 54
    assert sum(count for text, count in mixed.items() if text[0] == "b") == 18
    assert {count for text, count in mixed.items() if text[0] == "a"} == {3}
    assert len(held_out) == 8
    assert not held_out & set(mixed)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert any("a.jsonl: 54 samples in every epoch, from 18 rows" in notice for notice in data.notices)


def test_sources_when_not_weighted_are_joined(make_data: Make, write_rows: Write, tokenizer: Any) -> None:
    sources = [{"train_files": [write_rows(numbered(i, i + 2), f"{i}.jsonl")]} for i in (0, 2)]
    data = make_data(sources=sources)
    assert texts(data.train, tokenizer) == [f"row {i}" for i in range(4)]


def test_sources_when_keys_are_wrong(make_data: Make, write_rows: Write) -> None:
    file = write_rows(numbered(0, 1))
    with pytest.raises(ConfigError) as error:
        make_data(sources=[{"train_file": [file]}, {"train_files": [file], "dataset_name": "a/b"}])
    assert "data.sources[0].train_file is not a setting. Did you mean train_files?" in str(error.value)
    assert "data.sources[1] needs either train_files or dataset_name" in str(error.value)


# ---------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_the_samples_not_of_the_files(make_data: Make, write_rows: Write) -> None:
    file = write_rows(numbered(0, 20))
    moved = write_rows(numbered(0, 20), "moved.jsonl")
    fingerprint = make_data(train_files=[file]).fingerprint
    assert make_data(train_files=[moved]).fingerprint == fingerprint
    changed = [
        make_data(train_files=[write_rows(numbered(1, 21), "other.jsonl")]),
        make_data(train_files=[file], max_length=4),
        make_data(train_files=[file], packing=True),
        make_data(train_files=[file], eval_split=0.1),
    ]
    assert len({fingerprint, *(data.fingerprint for data in changed)}) == 5


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("split", [None, 0.2])
def test_fingerprint_is_that_of_the_first_version_when_a_checkpoint_has_one(
    make_data: Make, write_rows: Write, packing: bool, split: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are so many that a new run gets another: its resume finds its own samples again."""

    def first_version(data: Data) -> str:
        stores, packs = data.train._stores, data.train._packs
        order = np.arange(data.train.num_rows) if data.train._order is None else data.train._order
        digest = hashlib.sha256("".join(store.content for store in stores).encode())
        digest.update((order if packs is None else order[packs.order]).tobytes())  # type: ignore[union-attr]
        digest.update(b"none" if packs is None else packs.bounds.tobytes())  # type: ignore[union-attr]
        return digest.hexdigest()

    settings = {
        "train_files": [write_rows(numbered(0, 20)), write_rows(numbered(0, 20), "more.jsonl")], "max_length": 24,
        "packing": packing, "eval_split": split,
    }  # fmt: skip
    few = make_data(**settings)
    first = few.fingerprint
    assert first == first_version(few)
    monkeypatch.setattr("launcher.data.sampler._MAX_SORTED_ROWS", 10)
    many = make_data(**settings)
    assert many.fingerprint == make_data(**settings).fingerprint != first
    assert many.fingerprints.like(first) == first
    assert few.fingerprints.like(many.fingerprint) == many.fingerprint
    ids = np.arange(len(few.train))
    assert len(many.train) == len(ids) and many.train.num_tokens(ids) == few.train.num_tokens(ids)
    assert many.train.sample_lengths().tolist() == few.train.sample_lengths().tolist()
    for i in ids.tolist():
        (same, also) = ([row.tolist() for row, _ in data.train.segments(i)] for data in (few, many))
        assert same == also


def test_fingerprint_when_only_the_mask_changes(make_data: Make, write_rows: Write) -> None:
    file = write_rows([chat("q", "a")])
    everywhere = make_data(train_files=[file], completion_only_loss=False)
    assert everywhere.fingerprint != make_data(train_files=[file]).fingerprint


# ---------------------------------------------------------------------- several processes


def test_every_process_waits_once_and_sees_the_same(write_rows: Write, tokenizer: Any, tmp_path: Path) -> None:
    config = RunConfig(data=DataConfig(train_files=[write_rows(numbered(0, 5))], cache_dir=str(tmp_path / "c")))
    built: list[Data] = []
    calls: list[str] = []

    def build() -> None:
        """The barrier of another process: the builder has built by the time it returns."""
        calls.append("reader")
        built.append(build_data(config, tokenizer, is_builder=True, wait=lambda: calls.append("builder")))

    read = build_data(config, tokenizer, is_builder=False, wait=build)
    assert calls == ["reader", "builder"]
    assert read.fingerprint == built[0].fingerprint


def test_every_process_waits_once_when_building_fails(write_rows: Write, tokenizer: Any, tmp_path: Path) -> None:
    config = RunConfig(data=DataConfig(train_files=[write_rows(["{"])], cache_dir=str(tmp_path / "c")))
    for is_builder, why in ((True, "invalid JSON"), (False, "was not tokenised")):
        calls: list[int] = []
        with pytest.raises(DataError, match=why):
            build_data(config, tokenizer, is_builder=is_builder, wait=lambda calls=calls: calls.append(1))
        assert calls == [1]


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batch_is_one_long_sequence_with_borders_when_flat(
    write_rows: Write, tokenizer: Any, packing: bool
) -> None:
    """Flash attention takes rows in a batch of one only (modeling_flash_attention_utils._is_packed_sequence)."""
    config = RunConfig(data=DataConfig(train_files=[write_rows(numbered(0, 20))], packing=packing, max_length=20))
    config.data.cache_dir = str(Path(config.data.train_files[0]).parent / "cache")
    data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
    padded = collate(data.train, np.arange(3), 0)
    data.use_flat_batches(True)
    rows = [row for sample in range(3) for row in data.train.segments(sample)]
    flat = collate(data.train, np.arange(3), 0)
    assert flat["input_ids"].tolist() == [[token for tokens, _ in rows for token in tokens]]
    assert flat["position_ids"].tolist() == [[at for tokens, _ in rows for at in range(len(tokens))]]
    assert flat["cu_seq_lens_q"].tolist() == [0, *np.cumsum([len(tokens) for tokens, _ in rows])]
    assert flat["max_length_q"] == max(len(tokens) for tokens, _ in rows)
    assert type(flat["max_length_q"]) is int  # a tensor would be asked for by the host in every layer
    assert "attention_mask" not in flat
    assert (flat["labels"] != -100).sum() == (padded["labels"] != -100).sum()
    nothing = collate(data.train, np.arange(0), 0)
    assert nothing["cu_seq_lens_q"].tolist() == [0, nothing["input_ids"].shape[1]]


def test_files_that_may_not_be_meant_are_named(make_data: Callable[..., Data], tmp_path: Path) -> None:
    for name in ("train/a.jsonl", "test/a.jsonl", "contest/a.jsonl"):
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text('{"text": "red"}\n')
    folder, own = tmp_path / "rows", tmp_path / "rows/test/a.jsonl"
    (notice,) = make_data(train_files=[str(folder)]).notices
    assert (
        f"1 of 3 files found are trained on although they are named like data for evaluation, the first: {own}"
        in notice
    )
    assert make_data(train_files=[str(own)]).notices == []  # it is what was asked for
    assert make_data(train_files=[str(folder / "train"), str(folder / "contest")]).notices == []
    (notice,) = make_data(train_files=[str(own), str(own.parent / ".." / "test" / "*.jsonl")]).notices
    assert "2 times: its rows are trained on as often" in notice
    assert any("what is evaluated on is trained on" in text for text in
               make_data(train_files=[str(folder)], eval_files=[str(own)]).notices)  # fmt: skip


def test_what_holds_no_file_is_said_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, why in (("empty", "a folder without"), ("pipe.jsonl", "no file"), ("none.jsonl", "does not exist")):
        with pytest.raises(ConfigError, match=rf"data\.train_files: .*{name} (is )?{why}"):
            compose([f"data.train_files=[{tmp_path / name}]", "model=tiny_llama"])


@pytest.mark.parametrize("weight", [".inf", ".nan", "0", "-1", "true", "'1'"])
def test_a_weight_of_a_source_is_a_number_above_0(tmp_path: Path, weight: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    source = f"{{train_files: [{tmp_path / 'rows.jsonl'}], weight: {weight}}}"
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight must be a number above 0"):
        compose([f"data.sources=[{source}]", "model=tiny_llama"])
