"""Tokenised data on disk, under the hash of everything it depends on.

    <cache_dir>/tokens/<key>/  meta.json  tokens.bin  mask.bin  offsets.bin  labelled.bin  numbers.bin

A folder is written under a temporary name, made durable and renamed, so one with the right name is whole unless its
disk lied; `is_whole` reads it all again before a run trusts it. Of all processes that share the cache one builds, under
a lock with a heartbeat; the others wait for it. Should two build all the same, the first rename wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher.base.errors import DataError, RunLockedError
from launcher.base.files import fsync_dir, read_json_or, remove_tree, rename, write_file
from launcher.base.lock import RunLock, holder
from launcher.data.encoding import BuildReport, encode_in_order
from launcher.data.file_hashes import FileHashes
from launcher.data.formats import Formatter
from launcher.data.readers import Meter
from launcher.data.sources import Source
from launcher.data.tokenising_display import TokenisingDisplay

FORMAT_VERSION = 6
_POLL_S = 0.5
_TOKEN_DTYPES = ("uint16", "uint32")
_DTYPES = {"mask": "bool", "offsets": "int64", "labelled": "int64", "numbers": "int64"}


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
    """Maps a store; None where it is missing, half, of another format, or has files of the wrong size."""
    meta = read_json_or(folder / "meta.json", None)
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        return None
    try:
        files = meta["files"]
        if any((folder / name).stat().st_size != entry["bytes"] for name, entry in files.items()):
            return None
        if meta["dtype"] not in _TOKEN_DTYPES:
            return None
        dtypes = {"tokens": meta["dtype"], **_DTYPES}
        arrays = {name: _map(folder / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
        content = hashlib.sha256("".join(files[f"{n}.bin"]["sha256"] for n in ("tokens", "mask", "offsets")).encode())
        store = TokenStore(**arrays, report=BuildReport(**meta["report"]), content=content.hexdigest())
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        FileNotFoundError,
        NotADirectoryError,
    ):  # not as we write it
        return None
    return store if _fits(store) else None


def _fits(store: TokenStore) -> bool:
    """Whether its parts are of the same rows."""
    rows = len(store)
    if len(store.offsets) != rows + 1 or len(store.numbers) != rows:
        return False
    return bool(len(store.tokens) == len(store.mask) == store.offsets[-1])


def is_whole(folder: Path) -> bool:
    """Whether every byte is what meta.json says. Reads what is new or has changed since it was read last."""
    if open_store(folder) is None:
        return False
    files = read_json_or(folder / "meta.json", {})["files"]
    hashes = FileHashes(folder.parent.parent)
    return all(hashes.sha256(folder / name) == entry["sha256"] for name, entry in files.items())


def build_store(
    folder: Path, source: Source, formatter: Formatter, *, on_bad_row: str, num_workers: int = 1,
    display: TokenisingDisplay | None = None,
) -> None:  # fmt: skip
    """Makes sure that a whole store lies at `folder`, tokenising the source where there is none.

    After a crash only a folder `.tmp-…` can remain beside it, which the next build of the same key removes.

    Args:
        num_workers: processes that tokenise; what they make is the same for any number.
        display: shows how far it is; what its `alive` raises ends the work.

    Raises:
        DataError: rows cannot be used and on_bad_row=stop; none can be used; the source cannot be read; a worker was
            killed. ConfigError: a setting does not fit the data.
    """
    display = display or TokenisingDisplay()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if is_whole(folder):
        return
    with _only_builder(folder, source.name, display) as lock:
        if is_whole(folder):
            return
        for left in folder.parent.glob(f".tmp-{folder.name}-*"):
            remove_tree(left)  # under the lock: nobody writes there
        temporary = folder.with_name(f".tmp-{folder.name}-{os.uname().nodename}-{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        try:
            _write_store(temporary, source, formatter, on_bad_row, num_workers, display)
            _publish(temporary, folder)
        except OSError as error:
            if lock.is_held():
                raise
            raise DataError(
                f"tokenising {source.name} stood still for more than a minute and was taken over by another process: "
                "run the same command again"
            ) from error
        finally:
            display.close()
            remove_tree(temporary)


@contextlib.contextmanager
def _only_builder(folder: Path, name: str, display: TokenisingDisplay) -> Iterator[RunLock]:
    """Held by one process of all machines that share the cache; taken over where its holder is gone."""
    path, is_told = folder.with_name(f"{folder.name}.builder"), False
    while True:
        lock = RunLock(path)
        try:
            lock.acquire([os.getpid()], alive=display.alive)
            break
        except RunLockedError:
            other = holder(path)
            if other is not None and not is_told:
                is_told = True
                who = f"host {other.host}, pid {other.pid}"
                display.say(f"{name}: waiting for {who}, which is tokenising it into the same cache")
            display.pause(_POLL_S)
    try:
        yield lock
    finally:
        lock.release()


def _publish(temporary: Path, folder: Path) -> None:
    if os.path.lexists(folder):
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


def _write_store(
    folder: Path, source: Source, formatter: Formatter, on_bad_row: str, num_workers: int, display: TokenisingDisplay
) -> None:
    report, meter = BuildReport(), Meter()
    dtype = "uint16" if len(formatter.tokenizer) <= 1 << 16 else "uint32"
    offsets, labelled, numbers = array("q", [0]), array("q"), array("q")
    alive = display.begin(source.name, meter, report)
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "mask.bin").open("wb") as mask_file:
        for batch in encode_in_order(source.batches(meter), formatter, num_workers, alive):
            tokens_file.write(batch.tokens.tobytes())
            mask_file.write(batch.mask.tobytes())
            offsets.extend((offsets[-1] + np.cumsum(batch.lengths, dtype=np.int64)).tolist())
            labelled.extend(batch.labelled)
            numbers.extend([report.num_read + number for number in batch.numbers])
            report.add(batch.report)
        for file in (tokens_file, mask_file):
            file.flush()
            os.fsync(file.fileno())
    display.end(offsets[-1])
    _stop_on_bad_rows(source, report, on_bad_row)
    for name, values in (("offsets", offsets), ("labelled", labelled), ("numbers", numbers)):
        write_file(folder / f"{name}.bin", values.tobytes())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.glob("*.bin"))
    }
    meta = {"format_version": FORMAT_VERSION, "dtype": dtype, "report": asdict(report), "files": files}
    write_file(folder / "meta.json", json.dumps(meta, indent=2).encode())
    fsync_dir(folder)


def _stop_on_bad_rows(source: Source, report: BuildReport, on_bad_row: str) -> None:
    if report.num_without_column == report.num_read > 0:
        raise DataError(
            f"{source.name}: no row has the columns that data.columns names. The first:\n  {report.problems[0]}\n"
            "Name a column that is there: data.columns.OURS=COLUMN"
        )
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


def _map(path: Path, dtype: Any) -> np.ndarray:
    # As a plain array: every slice of a memmap costs ten times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype=dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
