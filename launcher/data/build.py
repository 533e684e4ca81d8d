"""From the settings to token rows: which sources there are, tokenised once, split, mixed and packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

import numpy as np

from launcher.base.devices import num_cores
from launcher.base.errors import DataError, LauncherError
from launcher.base.paths import default_cache_dir
from launcher.config.settings import DataConfig, RunConfig
from launcher.data.cache import FORMAT_VERSION, TokenStore, build_store, open_store
from launcher.data.encoding import BuildReport
from launcher.data.file_hashes import FileHashes
from launcher.data.fingerprint import Fingerprint
from launcher.data.formats import Formatter
from launcher.data.packing import PackPlan, Packs
from launcher.data.plan import DataPlan, data_plan, file_notices
from launcher.data.rows import RowLengths, TokenRows
from launcher.data.sampler import COMPUTED, order_for
from launcher.data.sources import Source, rows_of
from launcher.data.template_date import notice, template_date, with_template_date
from launcher.data.tokenising_display import TokenisingDisplay
from launcher.data.tokenizer import tokenizer_key

_MAX_NAMES = 10
_PIECE_ROWS = 1 << 20
_SPLIT_STREAM, _MIX_STREAM = 1, 2  # which draws a seed is used for


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured by."""

    train: TokenRows
    eval: TokenRows | None
    eval_rows: Sequence[dict[str, Any]]  # as they were read, for evaluations by generation; same order as `eval`
    notices: list[str]  # what was cut, left out or repeated
    end_token_ids: list[int]  # the special tokens that end what is learnt from, the most frequent first
    fingerprints: Fingerprint  # of the training samples: their tokens, masks and order
    longest: int = 0
    """Tokens of the longest row of all, as cut by max_length."""
    longest_place: Callable[[], str] = lambda: ""
    """File and line of that row: reads its source again."""

    @property
    def fingerprint(self) -> str:
        """That of a new run."""
        return self.fingerprints.like(None)

    def use_flat_batches(self, is_flat: bool, *, is_rounded: bool = False) -> None:
        """Whether a micro-batch is one long row, and whether it is brought to one of a few lengths."""
        for rows in (self.train, self.eval):
            if rows is not None:
                rows.is_flat, rows.is_rounded = is_flat, is_rounded


def build_data(
    config: RunConfig, tokenizer: Any, *, is_builder: bool, wait: Callable[[], None],
    display: TokenisingDisplay | None = None,
) -> Data:  # fmt: skip
    """Tokenises what is not in the cache yet, then maps it.

    Collective: every process calls it. One process per host builds (`is_builder`); every process calls `wait`, a
    barrier, exactly once, also where building fails, so that all of them end with an error and none hangs.

    Args:
        config: uses `data` and `seed` (for the split and the mixture).
        tokenizer: from `build_tokenizer`.
        is_builder: whether this is the local main process.
        wait: returns once every process has called it.
        display: of the builder.

    Raises:
        DataError: rows or files cannot be used; every bad row is named with file and line.
        ConfigError: settings contradict each other or the data.
    """
    if not is_builder:
        wait()  # afterwards the hashes of large files are known, too
    config = with_template_date(config, tokenizer)
    try:
        plan = data_plan(config.data)
        cache_dir = _cache_dir(config.data)
        formatter = build_formatter(config.data, tokenizer)
        sources = [*plan.train, *([plan.eval] if plan.eval else [])]
        folders = _folders(config.data, sources, tokenizer, cache_dir)
        if is_builder:
            _build_all(folders, sources, formatter, config.data, display)
    except LauncherError:
        if is_builder:
            wait()
        raise
    if is_builder:
        wait()
    stores = [_open(folder, source) for folder, source in zip(folders, sources, strict=True)]
    data = _assemble(config, plan, stores)
    return replace(data, notices=[*data.notices, *file_notices(config.data), *notice(config.data, tokenizer)])


def build_formatter(data: DataConfig, tokenizer: Any) -> Formatter:
    """What makes tokens of rows, by the settings."""
    return Formatter(
        tokenizer, data.max_length, data.completion_only_loss, data.loss_on, data.columns,
        template_date(data, tokenizer),
    )  # fmt: skip


def sources_of(config: RunConfig, tokenizer: Any, split: str) -> list[tuple[Source, np.ndarray]]:
    """The sources of a split (`train` or `eval`), each with the numbers of its rows that are used, in file order.

    Everything must be tokenised already (`build_data`).
    """
    plan = data_plan(config.data)
    sources = [*plan.train, *([plan.eval] if plan.eval else [])]
    folders = _folders(config.data, sources, tokenizer, _cache_dir(config.data))
    stores = [_open(folder, source) for folder, source in zip(folders, sources, strict=True)]
    if split == "eval" and plan.eval is not None:
        return [(plan.eval, stores[-1].numbers)]
    stores = stores[: len(plan.train)]
    chosen, held_out = _split(stores, plan.eval_fraction, config.seed)
    ids = chosen if split == "train" else held_out
    return [(source, store.numbers[own]) for source, store, own in zip(plan.train, stores, ids, strict=True)]


def _cache_dir(data: DataConfig) -> Path:
    return Path(data.cache_dir or default_cache_dir()).expanduser()


def _build_all(
    folders: list[Path], sources: list[Source], formatter: Formatter, data: DataConfig,
    display: TokenisingDisplay | None,
) -> None:  # fmt: skip
    """Builds every store, so that the bad rows of all sources are reported together."""
    problems = []
    for folder, source in zip(folders, sources, strict=True):
        try:
            build_store(
                folder, source, formatter, on_bad_row=data.on_bad_row,
                num_workers=data.dataset_num_proc or num_cores(), display=display,
            )  # fmt: skip
        except DataError as error:
            problems.append(str(error))
        except OSError as error:  # not of the source, whose errors are DataError
            raise DataError(
                f"tokenised data cannot be kept in {_cache_dir(data)}: {error}. Set data.cache_dir=FOLDER"
            ) from error
    if problems:
        raise DataError("\n".join(problems))


def _open(folder: Path, source: Source) -> TokenStore:
    store = open_store(folder)
    if store is None:
        raise DataError(f"{source.name} was not tokenised: the main process of this host says why")
    return store


def _folders(data: DataConfig, sources: list[Source], tokenizer: Any, cache_dir: Path) -> list[Path]:
    """Where each source's tokens lie: a hash of its content and of every setting that changes them."""
    hashes = FileHashes(cache_dir)
    common: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_key(tokenizer),
        "max_length": data.max_length,
        "completion_only_loss": data.completion_only_loss,
        "loss_on": data.loss_on,
        "columns": data.columns,
        "on_bad_row": data.on_bad_row,
    }
    if day := template_date(data, tokenizer):
        common["chat_template_date"] = day
    return [cache_dir / "tokens" / _hash({**common, "content": source.content_key(hashes)})[:32] for source in sources]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------- split, mix, pack


def _assemble(config: RunConfig, plan: DataPlan, stores: list[TokenStore]) -> Data:
    notices = [
        notice
        for source, store in zip([*plan.train, *([plan.eval] if plan.eval else [])], stores, strict=True)
        for notice in _store_notices(source, store, config.data.max_length)
    ]
    train_stores = stores[: len(plan.train)]
    is_every = plan.eval_fraction is None and plan.weights is None
    chosen, held_out = ([], []) if is_every else _split(train_stores, plan.eval_fraction, config.seed)
    if plan.weights is not None:
        chosen = _mix(chosen, plan.weights, config.seed)
        notices += [
            f"{source.name}: {len(ids)} samples in every epoch, from {len(np.unique(ids))} rows"
            for source, ids in zip(plan.train, chosen, strict=True)
        ]
    order = None if is_every else _join(train_stores, chosen)
    packs = _packs(train_stores, order, config.data.max_length, notices) if config.data.packing else None
    train = TokenRows(train_stores, order, packs=packs)
    if plan.eval is not None:
        store = stores[-1]
        evaluation: TokenRows | None = TokenRows([store])
        raw = _RawRows([(plan.eval, store.numbers)])
    elif plan.eval_fraction is not None:
        evaluation = TokenRows(train_stores, _join(train_stores, held_out))
        pieces = zip(plan.train, train_stores, held_out, strict=True)
        raw = _RawRows([(source, store.numbers[ids]) for source, store, ids in pieces])
    else:
        evaluation, raw = None, _RawRows([])
    longest, place = _longest([*plan.train, *([plan.eval] if plan.eval else [])], stores)
    fingerprints = Fingerprint(train_stores, order, config.data.max_length if config.data.packing else None)
    return Data(train, evaluation, raw, notices, _end_tokens(train_stores), fingerprints, longest, place)


def _packs(stores: list[TokenStore], order: np.ndarray | None, max_length: int, notices: list[str]) -> Packs | PackPlan:
    lengths = RowLengths(stores, order)
    num_rows = len(lengths)
    packs: Packs | PackPlan
    if order_for(num_rows) == COMPUTED:
        packs = PackPlan(lengths, max_length)
        num_tokens = packs.num_tokens
    else:
        found = lengths.piece(0, num_rows)
        packs, num_tokens = Packs(found, max_length), int(found.sum())
    fill = num_tokens / (len(packs) * max_length)
    notices.append(f"packing: {num_rows} rows in {len(packs)} samples, {fill:.1%} full")
    return packs


def _longest(sources: list[Source], stores: list[TokenStore]) -> tuple[int, Callable[[], str]]:
    """(tokens of the longest row, what says where the first such row is)."""
    longest, part, row = 0, 0, 0
    for i, store in enumerate(stores):
        lengths = RowLengths([store], None)
        for start in range(0, len(store), _PIECE_ROWS):
            piece = lengths.piece(start, min(len(store), start + _PIECE_ROWS))
            if (found := int(piece.max())) > longest:
                longest, part, row = found, i, start + int(piece.argmax())
    number = int(stores[part].numbers[row])

    def place() -> str:
        return next(raw.where for i, raw in enumerate(rows_of(sources[part])) if i == number)

    return longest, place


def _end_tokens(stores: list[TokenStore]) -> list[int]:
    counts: dict[int, int] = {}
    for store in stores:
        for token, count in store.report.end_tokens.items():
            counts[int(token)] = counts.get(int(token), 0) + count
    return sorted(counts, key=lambda token: -counts[token])


def _split(stores: list[TokenStore], fraction: float | None, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(training rows, held-out rows) of each store, both in their own order; before mixing, so that none is in both."""
    chosen, held_out = [], []
    for i, store in enumerate(stores):
        num_held_out = 0 if fraction is None else max(1, round(fraction * len(store)))
        if num_held_out >= len(store):
            raise DataError(
                f"data.eval_split={fraction} leaves nothing to train on: a source has {len(store)} usable rows"
            )
        if not num_held_out:
            chosen.append(np.arange(len(store)))
            held_out.append(chosen[-1][:0])
            continue
        permutation = _permutation(len(store), seed, _SPLIT_STREAM, i)
        held_out.append(np.sort(permutation[:num_held_out]))
        chosen.append(np.sort(permutation[num_held_out:]))
    return chosen, held_out


def _mix(chosen: list[np.ndarray], weights: list[float], seed: int) -> list[np.ndarray]:
    """As many samples as there are rows, shared out by weight: rows of a source are repeated or left out, seeded."""
    total = sum(len(ids) for ids in chosen)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) * total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    mixed = []
    for i, (ids, count) in enumerate(zip(chosen, counts, strict=True)):
        repeats, rest = divmod(count, len(ids))
        extra = ids[_permutation(len(ids), seed, _MIX_STREAM, i)[:rest]]
        mixed.append(np.sort(np.concatenate([np.tile(ids, repeats), extra])))
    return mixed


def _permutation(num: int, *seeds: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(num), kind="stable")


def _join(stores: list[TokenStore], ids: list[np.ndarray]) -> np.ndarray:
    starts = np.cumsum([0, *(len(store) for store in stores)])
    return np.concatenate([own + start for own, start in zip(ids, starts[:-1], strict=True)])


def _store_notices(source: Source, store: TokenStore, max_length: int) -> Iterator[str]:
    report = store.report
    if report.num_truncated:
        yield (
            f"{source.name}: {report.num_truncated} of {report.num_read} rows were cut to "
            f"data.max_length={max_length} tokens and lost their end with it"
        )
    if report.num_unlabelled:
        yield (
            f"{source.name}: {report.num_unlabelled} of {report.num_read} rows have no token to learn from within "
            f"data.max_length={max_length} and were left out"
        )
    if report.num_bad:
        yield (
            f"{source.name}: {report.num_bad} of {report.num_read} rows cannot be used and were skipped, "
            f"the first: {report.problems[0]}"
        )
    if report.num_endless:
        yield (
            f"{source.name}: {report.num_endless} of {report.num_read} rows do not end with a special token: a model "
            "that learns from them alone does not learn to stop (data.chat_template, model.eos_token)"
        )
    if report.unused:
        yield f"{source.name}: not used: {_unused(report)}"
    if report.num_rewritten:
        yield (
            f"{source.name}: the chat template changed the assistant's words in {report.num_rewritten} of "
            f"{report.num_read} rows (reasoning models' templates drop <think> parts); data.chat_template sets another"
        )


def _unused(report: BuildReport) -> str:
    """Names, the most frequent first; with a count where not every row has it."""
    by_count = sorted(report.unused.items(), key=lambda item: (-item[1], item[0]))
    shown = [
        name if count == report.num_read else f"{name} ({count} of {report.num_read} rows)"
        for name, count in by_count[:_MAX_NAMES]
    ]
    return ", ".join([*shown, *(["…"] if len(by_count) > _MAX_NAMES else [])])


class _RawRows(Sequence[dict[str, Any]]):
    """Rows as they were read, by their number in a source; read again at first use, then kept."""

    def __init__(self, pieces: list[tuple[Source, np.ndarray]]) -> None:
        self._pieces = pieces
        self._rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self._pieces)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if self._rows is None:
            self._rows = [row for source, numbers in self._pieces for row in _read(source, numbers)]
        return self._rows[index]


def _read(source: Source, numbers: np.ndarray) -> Iterator[dict[str, Any]]:
    wanted = iter(numbers.tolist())
    following = next(wanted, None)
    for number, row in enumerate(rows_of(source)):
        if following is None:
            return
        if number == following:
            assert row.value is not None  # it was usable when it was tokenised
            yield row.value
            following = next(wanted, None)
