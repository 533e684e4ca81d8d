"""Files of rows, streamed in batches that know where each row stands. What is costly to read is read by whoever takes
the batch, so that worker processes share it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.base.errors import DataError
from launcher.data.normalise import without_nulls

MAX_BATCH_ROWS, MAX_BATCH_BYTES = 512, 1 << 18
"""Where batches end follows from the rows alone: what is made of a batch is the same for any number of workers."""
_PIECE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF_16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, with where it stands; `problem` says why there is no value."""

    where: str
    value: dict[str, Any] | None
    problem: str | None = None


class Batch(Protocol):
    """Rows that follow each other. Can be pickled."""

    def rows(self) -> list[RawRow]:
        """Never raises: what cannot be used says so itself."""


@dataclass
class Meter:
    """How much of a source is read, in its own unit. `total` is None where it is not known."""

    done: int = 0
    total: int | None = None


@dataclass(frozen=True)
class JsonTexts:
    """Rows as JSON text, each with its place in the file: a line, or the number of an element."""

    path: str
    texts: list[tuple[str, bytes | str]]

    def rows(self) -> list[RawRow]:
        return [_json_row(f"{self.path}:{place}", text) for place, text in self.texts]


@dataclass(frozen=True)
class TableRows:
    """Rows of a table format: a pyarrow RecordBatch. A null is no value there."""

    path: str
    first: int
    table: Any

    def rows(self) -> list[RawRow]:
        return [
            RawRow(f"{self.path}:{number}", without_nulls(value))
            for number, value in enumerate(self.table.to_pylist(), start=self.first)
        ]


@dataclass(frozen=True)
class ReadRows:
    """Rows that are read already."""

    values: list[RawRow]

    def rows(self) -> list[RawRow]:
        return self.values


KINDS = {".parquet": "parquet", ".csv": "csv"}
"""Everything else is JSON."""
_PACKED = (".gz", ".zst")


def kind_of(path: Path) -> str:
    return KINDS.get(Path(_unpacked_name(path)).suffix, "json")


def _unpacked_name(path: Path) -> str:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return name


def file_batches(path: Path, meter: Meter) -> Iterator[Batch]:
    """The rows of one file.

    Args:
        meter: counts the bytes of the file as it lies on the disk.

    Raises:
        DataError: it cannot be read to its end.
    """
    before, size = meter.done, path.stat().st_size
    try:
        reader = {"parquet": _parquet_batches, "csv": _csv_batches, "json": _json_batches}[kind_of(path)]
        for batch, done in reader(path):
            meter.done = before + done
            yield batch
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    meter.done = before + size


def grouped(rows: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Lists of rows, each given with about how many bytes it has."""
    group: list[Any] = []
    num_bytes = 0
    for row, size in rows:
        group.append(row)
        num_bytes += size
        if len(group) == MAX_BATCH_ROWS or num_bytes >= MAX_BATCH_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


# ---------------------------------------------------------------------- JSON


def _json_batches(path: Path) -> Iterator[tuple[Batch, int]]:
    """One row per line; blank lines are no rows. A file that is one JSON array gives its elements."""
    number = 0

    def lines(file: Any) -> Iterator[tuple[tuple[str, bytes], int]]:
        nonlocal number
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if text.strip():
                yield (str(number), text), len(text)

    try:
        with _open(path) as (file, _):
            head = _utf_8(file).read(4096).removeprefix(_BOM).lstrip()
        with _open(path) as (packed, tell):
            file = _utf_8(packed)
            if _is_array(path, head):
                found = grouped(_array_elements(path, file))
            elif _is_one_object(path, head):
                text = file.read().removeprefix(_BOM)
                found = iter([[("1", text)]])
            else:
                found = grouped(lines(file))
            for texts in found:
                yield JsonTexts(str(path), texts), tell()
    except (EOFError, zlib.error, OSError, UnicodeError) as error:  # a file that was cut off or damaged
        raise DataError(f"{path} cannot be read after line {number}: {error}") from error


def _is_array(path: Path, head: bytes) -> bool:
    """Whether a file is one JSON array; in JSON Lines a line may be a list by mistake."""
    is_json = _unpacked_name(path).endswith(".json")
    return head.startswith(b"[") and (is_json or head[1:].lstrip().startswith(b"{"))


def _is_one_object(path: Path, head: bytes) -> bool:
    """Whether a .json file is one object over several lines."""
    return _unpacked_name(path).endswith(".json") and head.split(b"\n", 1)[0].strip() == b"{"


def _json_row(where: str, text: bytes | str) -> RawRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; too many levels
        return RawRow(where, None, f"invalid JSON: {error}")
    if isinstance(value, dict):
        return RawRow(where, value)
    return RawRow(where, None, f"must be a JSON object (got {type(value).__name__})")


class _ArrayText:
    """The text of an array, of which only what is still to be read is held."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._lines, self._is_end = "", 0, 1, False
        self._decoder = json.JSONDecoder()

    def mark(self) -> str:
        """The next character that is no white space, taken; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                self._at += 1
                return self._text[self._at - 1]
            if not self._more():
                return ""

    def back(self) -> None:
        self._at -= 1

    def value(self) -> str:
        """The text of the JSON value that begins here, taken."""
        if self.mark():
            self.back()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_end or not self._more():  # a number may go on
                    text, self._at = self._text[self._at : end], end
                    return text
            except RecursionError as error:
                raise self.error("too many levels") from error
            except ValueError as error:
                if not self._more():
                    raise self.error(str(error)) from error

    def error(self, what: str) -> DataError:
        line = self._lines + self._text.count("\n", 0, self._at)
        return DataError(f"{self._path} cannot be read: the array is invalid JSON from line {line} on ({what})")

    def _more(self) -> bool:
        """Reads as much again as is held, so that what is tried again and again stays linear; False at the end."""
        if self._is_end:
            return False
        self._lines += self._text.count("\n", 0, self._at)
        held = self._text[self._at :]
        piece = self._file.read(max(_PIECE_BYTES, len(held)))
        self._is_end = not piece
        self._text, self._at = held + self._decode(piece, final=self._is_end), 0
        return True


def _array_elements(path: Path, file: Any) -> Iterator[tuple[tuple[str, str], int]]:
    """The elements of an array as ([number], text).

    Raises:
        DataError: it is no JSON from some place on, which is named.
    """
    text, number = _ArrayText(path, file), 0
    text.mark()  # the bracket
    if (mark := text.mark()) not in ("]", ""):
        text.back()
        mark = ","
    while mark == ",":
        value, number = text.value(), number + 1
        yield (f"[{number}]", value), len(value)
        if (mark := text.mark()) not in (",", "]"):
            raise text.error(f"expecting ',' or ']' after element {number}, got {mark!r}")
    if mark != "]":
        raise text.error("the file ends inside of it")
    if rest := text.mark():
        raise text.error(f"{rest!r} follows the array")


# ---------------------------------------------------------------------- CSV, Parquet


def _csv_batches(path: Path) -> Iterator[tuple[Batch, int]]:
    """The first line names the columns; an empty cell is no value."""
    csv.field_size_limit(sys.maxsize)
    number = 1

    def lines(text: io.TextIOWrapper) -> Iterator[tuple[RawRow, int]]:
        nonlocal number
        head = text.readline()
        reader = csv.DictReader(itertools.chain([head], text), strict=True, delimiter=_delimiter(head))
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: the header has the column {twice[0]!r} more than once")
        for value in reader:
            number = reader.line_num
            where = f"{path}:{number}"
            if None in value or None in value.values():
                wanted = len(names)
                yield RawRow(where, None, f"has not as many cells as the header ({wanted})"), 0
            else:
                cells = {key: cell for key, cell in value.items() if cell != ""}
                yield RawRow(where, cells), sum(map(len, cells.values()))

    try:
        with _open(path) as (binary, tell):
            encoding = "utf-16" if _is_utf_16(binary) else "utf-8-sig"
            with io.TextIOWrapper(binary, encoding=encoding, newline="") as text:
                for rows in grouped(lines(text)):
                    yield ReadRows(rows), tell()
    except (csv.Error, UnicodeError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV after line {number}: {error}") from error


def _delimiter(head: str) -> str:
    """What stands between the names in the first line: spreadsheets of other languages write semicolons."""
    return "," if "," in head else next((mark for mark in ";\t" if mark in head), ",")


def _parquet_batches(path: Path) -> Iterator[tuple[Batch, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open(path) as (stream, _), pq.ParquetFile(stream) as file:
            total, size = max(1, file.metadata.num_rows), path.stat().st_size
            for table in file.iter_batches(batch_size=_rows_of_about(MAX_BATCH_BYTES, file.metadata)):
                yield TableRows(str(path), number + 1, table), size * (number + table.num_rows) // total
                number += table.num_rows
    except (pa.ArrowException, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as Parquet (after row {number}): {error}") from error


def _rows_of_about(num_bytes: int, metadata: Any) -> int:
    """How many rows of a Parquet file have about so many bytes."""
    whole = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(1, min(MAX_BATCH_ROWS, int(num_bytes * metadata.num_rows // max(1, whole))))


# ---------------------------------------------------------------------- bytes


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The bytes of a file, unpacked, and how many are read of those on the disk; seekable for Parquet."""
    name = path.name.lower()
    with path.open("rb") as raw, contextlib.ExitStack() as stack:
        file: Any = raw
        if name.endswith(".gz"):
            file = stack.enter_context(gzip.open(raw, "rb"))
        elif name.endswith(".zst"):
            import pyarrow as pa

            stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
            file = io.BytesIO(stream.read()) if kind_of(path) == "parquet" else io.BufferedReader(stream)
        yield file, raw.tell


def _is_utf_16(file: Any) -> bool:
    """Whether a file begins with the mark of UTF-16, as some Windows programs write it."""
    return bytes(file.peek(2)[:2]) in _UTF_16_BOMS


def _utf_8(file: Any) -> Any:
    return codecs.EncodedFile(file, "utf-8", "utf-16") if _is_utf_16(file) else file
