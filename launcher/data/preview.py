"""Rows as they are trained on, and what a whole data set looks like: the window of `launcher preview`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from launcher.config.settings import RunConfig
from launcher.data.build import Data, build_data, build_formatter, sources_of
from launcher.data.formats import Encoded, Formatter
from launcher.data.readers import RawRow
from launcher.data.rows import NO_LOSS, TokenRows
from launcher.data.sampler import StepSampler, split_step
from launcher.data.sources import rows_of
from launcher.data.template_date import with_template_date
from launcher.data.tokenising_display import TokenisingDisplay

_MAX_STEPS_MEASURED = 200


@dataclass(frozen=True)
class PreviewRow:
    """A row as it is trained on. `labels` are not shifted; -100 where no loss is taken."""

    source: str
    line: int
    text: str
    input_ids: list[int]
    labels: list[int]
    num_tokens: int
    num_labelled: int
    is_truncated: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SetSummary:
    """The whole set. `padding` is the share of padding among the tokens of the first epoch's micro-batches."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_labelled: int
    lengths: np.ndarray
    padding: float


def preview(
    config: RunConfig, tokenizer: Any, *, split: str, num_rows: int, num_processes: int = 1
) -> tuple[list[PreviewRow], SetSummary | None, Data]:
    """The first rows of a split, in the order of its files, and a summary of all of it.

    Tokenises what is not in the cache yet, as a run would.

    Raises:
        DataError, ConfigError: as `build_data`.
    """
    config = with_template_date(config, tokenizer)
    data = build_data(config, tokenizer, is_builder=True, wait=lambda: None, display=TokenisingDisplay(is_shown=True))
    formatter = build_formatter(config.data, tokenizer)
    shown: list[PreviewRow] = []
    for source, numbers in sources_of(config, tokenizer, split):
        if len(shown) >= num_rows:
            break
        wanted = set(numbers[: num_rows - len(shown)].tolist())
        rows = (row for number, row in enumerate(rows_of(source)) if number in wanted)
        for _, row in zip(wanted, rows, strict=False):
            shown.append(_row(formatter, tokenizer, row))
    rows_of_split = data.train if split == "train" else data.eval
    return shown, _summary(config, rows_of_split, num_processes) if rows_of_split is not None else None, data


def _row(formatter: Formatter, tokenizer: Any, row: RawRow) -> PreviewRow:
    assert row.value is not None  # it was usable when it was tokenised
    (encoded,) = formatter.encode([(row.where, row.value)])
    assert isinstance(encoded, Encoded)
    ids = encoded.tokens.tolist()
    labels = [token if has_loss else NO_LOSS for token, has_loss in zip(ids, encoded.mask.tolist(), strict=True)]
    source, _, line = row.where.rpartition(":")
    return PreviewRow(
        source, int(line.strip("[]")), decode(tokenizer, ids), ids, labels, len(ids), int(encoded.mask.sum()),
        encoded.is_truncated,
    )  # fmt: skip


def runs(tokenizer: Any, row: PreviewRow) -> Iterator[tuple[str, bool]]:
    """The text of a row cut where loss begins and ends: (text, whether loss is taken)."""
    pairs = zip(row.input_ids, row.labels, strict=True)
    for has_loss, group in groupby(pairs, key=lambda pair: pair[1] != NO_LOSS):
        yield decode(tokenizer, [token for token, _ in group]), has_loss


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _summary(config: RunConfig, rows: TokenRows, num_processes: int) -> SetSummary:
    lengths = rows.sample_lengths()
    return SetSummary(
        num_rows=rows.num_rows, num_samples=len(rows), num_tokens=int(lengths.sum()),
        num_labelled=rows.num_labelled_tokens(np.arange(len(rows))), lengths=lengths,
        padding=_padding(config, lengths, num_processes),
    )  # fmt: skip


def _padding(config: RunConfig, lengths: np.ndarray, num_processes: int) -> float:
    sampler = StepSampler(len(lengths), config.train.train_batch_size, config.seed)
    real = padded = 0
    for step in range(min(_MAX_STEPS_MEASURED, sampler.total_steps(1.0))):
        ids = sampler.rows_of_step(step)
        for rank in range(num_processes):
            for batch in split_step(ids, rank, num_processes, config.train.micro_batch_size):
                if len(batch):
                    real += int(lengths[batch].sum())
                    padded += int(lengths[batch].max()) * len(batch)
    return 1 - real / padded if padded else 0.0
