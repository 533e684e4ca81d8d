"""Where rows come from: JSON Lines, JSON, CSV and Parquet files, a Hub data set, a generator. Rows are streamed."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.base.errors import DataError
from launcher.data.file_hashes import FileHashes
from launcher.data.normalise import without_nulls
from launcher.data.readers import Batch, Meter, RawRow, ReadRows, file_batches, grouped, kind_of


class Source(Protocol):
    """A finite stream of rows that can be read again and again."""

    @property
    def name(self) -> str:
        """For messages."""

    def content_key(self, hashes: FileHashes) -> str:
        """Changes whenever the rows change."""

    def batches(self, meter: Meter) -> Iterator[Batch]:
        """Every row in a fixed order, unusable ones included.

        Args:
            meter: told how far the reading is.

        Raises:
            DataError: the source as a whole cannot be read.
        """


def rows_of(source: Source) -> Iterator[RawRow]:
    """Every row of a source, one by one."""
    for batch in source.batches(Meter()):
        yield from batch.rows()


@dataclass(frozen=True)
class FileSource:
    """JSON Lines (or a JSON array), CSV and Parquet files, plain, .gz or .zst, in the order given."""

    paths: tuple[Path, ...]

    @property
    def name(self) -> str:
        first = str(self.paths[0]) if self.paths else "no file"
        return first if len(self.paths) < 2 else f"{first} and {len(self.paths) - 1} more"

    def content_key(self, hashes: FileHashes) -> str:
        return ",".join(f"{kind_of(path)}:{hashes.sha256(path)}" for path in self.paths)

    def batches(self, meter: Meter) -> Iterator[Batch]:
        meter.total = sum(path.stat().st_size for path in self.paths)
        for path in self.paths:
            yield from file_batches(path, meter)


_DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, or a folder that `datasets` understands."""

    dataset_name: str
    dataset_config: str | None
    split: str

    @property
    def name(self) -> str:
        config = f" ({self.dataset_config})" if self.dataset_config else ""
        return f"{self.dataset_name}{config}[{self.split}]"

    def content_key(self, hashes: FileHashes) -> str:
        return f"hub:{self._load()._fingerprint}"

    def batches(self, meter: Meter) -> Iterator[Batch]:
        rows = self._load()
        meter.total = len(rows)
        named = ((RawRow(f"{self.name}:{i}", without_nulls(row)), _size_of(row)) for i, row in enumerate(rows, start=1))
        for group in grouped(named):
            meter.done += len(group)
            yield ReadRows(group)

    def _load(self) -> Any:
        import datasets

        folder = Path(self.dataset_name).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = datasets.load_from_disk(str(folder))
                if isinstance(saved, datasets.DatasetDict):
                    return saved[self.split]
                if self.split not in (_DEFAULT_SPLIT, str(saved.split)):  # else the one part would be taken for another
                    raise ValueError(f"it holds one data set and no split {self.split!r}")
                return saved
            return datasets.load_dataset(self.dataset_name, self.dataset_config, split=self.split)
        except Exception as error:  # datasets raises two dozen classes of its own and its back ends' here
            reason = str(error).strip() or type(error).__name__
            raise DataError(
                f"data.dataset_name={self.dataset_name}: {self.name} cannot be loaded: {reason}. "
                "Check data.dataset_name, data.dataset_config, data.train_split and data.eval_split; "
                "without internet, run `launcher prefetch` beforehand where there is some"
            ) from error


@dataclass(frozen=True)
class GeneratorSource:
    """Rows made by code: `data.generator` names a class whose instance, called with a split, gives an iterable.

    The rows count as changed when the settings or the source file of the class change.
    """

    spec: dict[str, Any]
    split: str

    @property
    def name(self) -> str:
        return f"{self.spec.get('_target_')}[{self.split}]"

    def content_key(self, hashes: FileHashes) -> str:
        make = self._make()
        file = inspect.getsourcefile(make if inspect.isfunction(make) else type(make))
        code = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        return f"generator:{json.dumps(self.spec, sort_keys=True, default=str)}:{self.split}:{code}"

    def batches(self, meter: Meter) -> Iterator[Batch]:
        rows = self._make()(self.split)
        named = ((self._row(number, row), _size_of(row)) for number, row in enumerate(rows, start=1))
        for group in grouped(named):
            meter.done += len(group)
            yield ReadRows(group)

    def _row(self, number: int, row: Any) -> RawRow:
        where = f"{self.name}:{number}"
        if isinstance(row, dict):
            return RawRow(where, row)
        return RawRow(where, None, f"must be a dict (got {type(row).__name__})")

    def _make(self) -> Callable[[str], Iterable[Any]]:
        from hydra.utils import instantiate

        try:
            make: Callable[[str], Iterable[Any]] = instantiate(self.spec)
        except Exception as error:  # user code
            raise DataError(f"data.generator={self.spec} cannot be made: {error}") from error
        return make


def _size_of(value: Any) -> int:
    """About how many bytes of text a row holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    return sum(map(_size_of, value)) if isinstance(value, list) else 8
