"""Tokenised data on disk, under the hash of everything it depends on.

    <cache_dir>/tokens/<key>/  meta.json  tokens.bin  mask.bin  offsets.bin  labelled.bin  numbers.bin

A folder is written under a temporary name, made durable and renamed, so one with the right name is whole unless its
disk lied; `is_whole` reads it all again before a run trusts it. Builders on one host take turns (flock); elsewhere the
first rename wins and the others throw their copy away.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launcher.base.errors import DataError
from launcher.base.files import fsync_dir, open_append, read_json_or, remove_tree, rename, write_file
from launcher.data.file_hashes import FileHashes
from launcher.data.formats import Encoded, Formatter
from launcher.data.normalise import BadRowError
from launcher.data.sources import RawRow, Source

FORMAT_VERSION = 2
MAX_PROBLEMS_SHOWN = 20
_BATCH_ROWS = 512
_DTYPES = {"mask": "bool", "offsets": "int64", "labelled": "int64", "numbers": "int64"}


@dataclass
class BuildReport:
    """What happened to the rows of one source; kept with them, so that a cached start reports it too."""

    num_read: int = 0
    num_kept: int = 0
    num_bad: int = 0
    num_truncated: int = 0
    num_unlabelled: int = 0  # nothing left to learn from within max_length: left out
    num_rewritten: int = 0  # the chat template changed the assistant's words
    num_endless: int = 0  # what is learnt from has no special token at its end, and was not cut
    end_tokens: dict[str, int] = field(default_factory=dict)  # id of a special token → rows that end with it
    problems: list[str] = field(default_factory=list)  # the first MAX_PROBLEMS_SHOWN


@dataclass(frozen=True)
class TokenStore:
    """The rows of one source, memory-mapped. Row i: tokens[offsets[i]:offsets[i+1]], mask likewise.

    `numbers[i]` is its place among the rows read (from 0), `labelled[i]` its number of tokens that bear loss.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    labelled: np.ndarray
    numbers: np.ndarray
    report: BuildReport
    content: str  # hash of tokens, mask and offsets

    def __len__(self) -> int:
        return len(self.labelled)


def open_store(folder: Path) -> TokenStore | None:
    """Maps a store; None where it is missing, half or has files of the wrong size."""
    meta = read_json_or(folder / "meta.json", None)
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        return None
    files = meta["files"]
    if any(not (folder / n).is_file() or (folder / n).stat().st_size != f["bytes"] for n, f in files.items()):
        return None
    arrays = {name: _map(folder / f"{name}.bin", dtype) for name, dtype in {"tokens": meta["dtype"], **_DTYPES}.items()}
    content = hashlib.sha256("".join(files[f"{n}.bin"]["sha256"] for n in ("tokens", "mask", "offsets")).encode())
    return TokenStore(**arrays, report=BuildReport(**meta["report"]), content=content.hexdigest())


def is_whole(folder: Path) -> bool:
    """Whether every byte is what meta.json says. Reads what is new or has changed since it was read last."""
    if open_store(folder) is None:
        return False
    files = read_json_or(folder / "meta.json", {})["files"]
    hashes = FileHashes(folder.parent.parent)
    return all(hashes.sha256(folder / name) == entry["sha256"] for name, entry in files.items())


def build_store(folder: Path, source: Source, formatter: Formatter, *, on_bad_row: str) -> None:
    """Makes sure that a whole store lies at `folder`, tokenising the source where there is none.

    After a crash only a folder `.tmp-…` can remain beside it, which the next build of the same key removes.

    Raises:
        DataError: rows cannot be used and on_bad_row=stop; none can be used; the source cannot be read.
        ConfigError: a setting does not fit the data.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if is_whole(folder):
            return
        for left in folder.parent.glob(f".tmp-{folder.name}-{os.uname().nodename}-*"):
            remove_tree(left)  # under the lock: nobody on this host writes there
        temporary = folder.with_name(f".tmp-{folder.name}-{os.uname().nodename}-{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        try:
            _write_store(temporary, source, formatter, on_bad_row)
            _publish(temporary, folder)
        finally:
            remove_tree(temporary)


def _publish(temporary: Path, folder: Path) -> None:
    if folder.exists():
        if is_whole(folder):  # another host was faster
            return
        remove_tree(folder)
    with contextlib.suppress(FileExistsError):  # another host was faster by a hair: its content is the same
        try:
            rename(temporary, folder)
        except OSError as error:
            if folder.is_dir():
                raise FileExistsError from error
            raise


def _write_store(folder: Path, source: Source, formatter: Formatter, on_bad_row: str) -> None:
    report = BuildReport()
    dtype = "uint16" if len(formatter.tokenizer) <= 1 << 16 else "uint32"
    offsets, labelled, numbers = [0], [], []
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "mask.bin").open("wb") as mask_file:
        for number, encoded in _encode_all(source, formatter, report):
            tokens_file.write(encoded.tokens.astype(dtype).tobytes())
            mask_file.write(encoded.mask.tobytes())
            offsets.append(offsets[-1] + len(encoded.tokens))
            labelled.append(int(encoded.mask.sum()))
            numbers.append(number)
        for file in (tokens_file, mask_file):
            file.flush()
            os.fsync(file.fileno())
    report.num_kept = len(labelled)
    _stop_on_bad_rows(source, report, on_bad_row)
    for name, values in (("offsets", offsets), ("labelled", labelled), ("numbers", numbers)):
        write_file(folder / f"{name}.bin", np.asarray(values, dtype=np.int64).tobytes())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.glob("*.bin"))
    }
    meta = {"format_version": FORMAT_VERSION, "dtype": dtype, "report": asdict(report), "files": files}
    write_file(folder / "meta.json", json.dumps(meta, indent=2).encode())
    fsync_dir(folder)


def _encode_all(source: Source, formatter: Formatter, report: BuildReport) -> Iterator[tuple[int, Encoded]]:
    """The usable rows with their number, everything else counted in the report."""
    for batch in _batches(source.rows()):
        readable = [(row.where, row.value) for row in batch if row.value is not None]
        encoded = iter(formatter.encode(readable))
        for row in batch:
            number = report.num_read
            report.num_read += 1
            result = BadRowError(row.problem) if row.value is None else next(encoded)
            if isinstance(result, BadRowError):
                report.num_bad += 1
                if len(report.problems) < MAX_PROBLEMS_SHOWN:
                    report.problems.append(f"{row.where}: {result}")
                continue
            report.num_truncated += result.is_truncated
            report.num_rewritten += result.is_rewritten
            if result.end_token is not None:
                report.end_tokens[str(result.end_token)] = report.end_tokens.get(str(result.end_token), 0) + 1
            else:
                report.num_endless += not result.is_truncated
            if result.mask.any():
                yield number, result
            else:
                report.num_unlabelled += 1


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _stop_on_bad_rows(source: Source, report: BuildReport, on_bad_row: str) -> None:
    listed = "\n".join(f"  {problem}" for problem in report.problems)
    if report.num_bad > len(report.problems):
        listed += f"\n  … and {report.num_bad - len(report.problems)} more"
    if report.num_bad and on_bad_row == "stop":
        raise DataError(
            f"{source.name}: {report.num_bad} of {report.num_read} rows cannot be used:\n{listed}\n"
            "Mend them, or leave them out and count them: data.on_bad_row=skip"
        )
    if not report.num_kept:
        reasons = f", {report.num_bad} cannot be used" if report.num_bad else ""
        if report.num_unlabelled:
            reasons += f", {report.num_unlabelled} have no token to learn from within data.max_length"
        raise DataError(f"{source.name}: no row is left to use ({report.num_read} read{reasons})\n{listed}".rstrip())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this host at a time; the kernel lets go when its holder dies."""
    with open_append(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
