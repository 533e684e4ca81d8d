"""Where rows come from: JSON Lines, JSON, CSV and Parquet files, a Hub data set, a generator. Rows are streamed."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import inspect
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.base.errors import DataError
from launcher.data.file_hashes import FileHashes
from launcher.data.normalise import without_nulls

_PARQUET_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, with where it stands; `problem` says why there is no value."""

    where: str
    value: dict[str, Any] | None
    problem: str | None = None


class Source(Protocol):
    """A finite stream of rows that can be read again and again."""

    @property
    def name(self) -> str:
        """For messages."""

    def content_key(self, hashes: FileHashes) -> str:
        """Changes whenever the rows change."""

    def rows(self) -> Iterator[RawRow]:
        """Every row in a fixed order, unusable ones included.

        Raises:
            DataError: the source as a whole cannot be read.
        """


@dataclass(frozen=True)
class FileSource:
    """JSON Lines (or a JSON array), CSV and Parquet files, plain, .gz or .zst, in the order given."""

    paths: tuple[Path, ...]

    @property
    def name(self) -> str:
        first = str(self.paths[0]) if self.paths else "no file"
        return first if len(self.paths) < 2 else f"{first} and {len(self.paths) - 1} more"

    def content_key(self, hashes: FileHashes) -> str:
        return ",".join(f"{_kind(path)}:{hashes.sha256(path)}" for path in self.paths)

    def rows(self) -> Iterator[RawRow]:
        for path in self.paths:
            try:
                yield from {"parquet": _parquet_rows, "csv": _csv_rows, "json": _json_rows}[_kind(path)](path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}") from error


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

    def rows(self) -> Iterator[RawRow]:
        for number, row in enumerate(self._load(), start=1):
            yield RawRow(f"{self.name}:{number}", without_nulls(row))

    def _load(self) -> Any:
        import datasets

        folder = Path(self.dataset_name).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = datasets.load_from_disk(str(folder))
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
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

    def rows(self) -> Iterator[RawRow]:
        for number, row in enumerate(self._make()(self.split), start=1):
            where = f"{self.name}:{number}"
            is_row = isinstance(row, dict)
            yield RawRow(
                where, row if is_row else None, None if is_row else f"must be a dict (got {type(row).__name__})"
            )

    def _make(self) -> Callable[[str], Iterable[Any]]:
        from hydra.utils import instantiate

        try:
            make: Callable[[str], Iterable[Any]] = instantiate(self.spec)
        except Exception as error:  # user code
            raise DataError(f"data.generator={self.spec} cannot be made: {error}") from error
        return make


_PACKED = (".gz", ".zst")
_KINDS = {".parquet": "parquet", ".csv": "csv"}
"""Everything else is JSON."""


def _kind(path: Path) -> str:
    return _KINDS.get(Path(_unpacked_name(path)).suffix, "json")


def _unpacked_name(path: Path) -> str:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return name


def _json_rows(path: Path) -> Iterator[RawRow]:
    """One row per line; blank lines are no rows. A file that is one JSON array gives its elements."""
    number = 0
    try:
        with _open(path) as file:
            head = file.read(4096).removeprefix(_BOM).lstrip()
        with _open(path) as file:
            if _is_array(path, head):
                yield from _array_rows(path, file.read())
                return
            if _is_one_object(path, head):
                yield _json_row(f"{path}:1", file.read().removeprefix(_BOM))
                return
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(_BOM) if number == 1 else line
                if text.strip():
                    yield _json_row(f"{path}:{number}", text)
    except (EOFError, zlib.error, OSError) as error:  # a file that was cut off or damaged
        raise DataError(f"{path} cannot be read after line {number}: {error}") from error


def _is_array(path: Path, head: bytes) -> bool:
    """Whether a file is one JSON array; in JSON Lines a line may be a list by mistake."""
    is_json = _unpacked_name(path).endswith(".json")
    return head.startswith(b"[") and (is_json or head[1:].lstrip().startswith(b"{"))


def _is_one_object(path: Path, head: bytes) -> bool:
    """Whether a .json file is one object over several lines."""
    return _unpacked_name(path).endswith(".json") and head.split(b"\n", 1)[0].strip() == b"{"


def _json_row(where: str, line: bytes) -> RawRow:
    try:
        return _row(where, json.loads(line))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; too many levels
        return RawRow(where, None, f"invalid JSON: {error}")


def _array_rows(path: Path, content: bytes) -> Iterator[RawRow]:
    try:
        rows = json.loads(content.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        yield RawRow(f"{path}:{getattr(error, 'lineno', 1)}", None, f"invalid JSON: {error}")
        return
    for number, value in enumerate(rows, start=1):
        yield _row(f"{path}:[{number}]", value)


def _row(where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    return RawRow(where, None, f"must be a JSON object (got {type(value).__name__})")


def _csv_rows(path: Path) -> Iterator[RawRow]:
    """The first line names the columns; an empty cell is no value."""
    csv.field_size_limit(sys.maxsize)
    number = 1
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            for value in reader:
                number = reader.line_num
                if None in value or None in value.values():
                    wanted = len(reader.fieldnames or [])
                    yield RawRow(f"{path}:{number}", None, f"has not as many cells as the header ({wanted})")
                else:
                    yield RawRow(f"{path}:{number}", {key: cell for key, cell in value.items() if cell != ""})
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV after line {number}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open(path) as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", without_nulls(value))
    except (pa.ArrowException, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as Parquet (after row {number}): {error}") from error


def _open(path: Path) -> contextlib.AbstractContextManager[Any]:
    """The bytes of a file, unpacked; seekable where Parquet needs that."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
        return io.BytesIO(stream.read()) if _kind(path) == "parquet" else io.BufferedReader(stream)
    return path.open("rb")
