"""Byte ranges of files, written and read past the page cache where the file system can. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.base import files

BLOCK_BYTES = 4096
"""What offsets and addresses of direct writes are multiples of."""
_MIN_DIRECT_BYTES = 2**18


class RangeWriter:
    """Writes byte ranges into a file that others write into as well; durable after `sync`.

    Whole blocks go past the page cache (O_DIRECT) where the file system can do that: no copy, and no memory that the
    training would have to find anew. For it, data must lie in memory as it will lie in the blocks of the file. Measured
    for 450 MB: 0.02 s of processor time instead of 0.15 to 0.25 s.
    """

    def __init__(self, path: Path, size: int | None, *, within: Path | None = None) -> None:
        self._path = path
        self._direct_fd = -1
        try:
            self._fd = files.create_exclusive(path, within=within)
        except FileExistsError:  # of another process of this save
            self._fd = files.open_fd(path, os.O_WRONLY, within=within)
        try:
            if size is not None:
                os.ftruncate(self._fd, size)  # one process does; nobody writes beyond it
            self._direct_fd = _reopen_direct(self._fd, os.O_WRONLY)
        except OSError:
            os.close(self._fd)
            raise

    def write(self, data: memoryview, offset: int) -> None:
        low, high = whole_blocks(data, offset)
        if self._direct_fd >= 0 and high - low >= _MIN_DIRECT_BYTES:
            try:
                files.write_at(self._direct_fd, data[low:high], offset + low, self._path)
                files.write_at(self._fd, data[:low], offset, self._path)
                data, offset = data[high:], offset + high
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct_fd)  # opened, but refused: larger blocks, or memory it does not like
                self._direct_fd = -1
        files.write_at(self._fd, data, offset, self._path)

    def sync(self) -> None:
        files.fsync_file(self._fd, self._path)

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)


def whole_blocks(data: memoryview, offset: int) -> tuple[int, int]:
    """Which part of data that lies at an offset of a file is whole blocks of it; low > high where there is none."""
    return -offset % BLOCK_BYTES, len(data) - (offset + len(data)) % BLOCK_BYTES


def edges(data: memoryview, offset: int) -> Iterator[tuple[memoryview, int]]:
    """The parts of data in blocks that it does not fill, each inside one block, with their offsets in the file."""
    low, high = whole_blocks(data, offset)
    cuts = (0, low, high, len(data)) if low <= high else (0, min(low, len(data)), len(data), len(data))
    for start, end in (cuts[:2], cuts[2:]):
        if start < end:
            yield data[start:end], offset + start


def check_bytes(path: Path, parts: Iterable[tuple[memoryview, int]], within: Path | None = None) -> None:
    """Compares small parts of a file, each inside one block, with what they should be.

    Raises:
        OSError: one differs.
    """
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    with contextlib.ExitStack() as stack:
        fds = _open_for_reading(path, within, stack)
        for data, offset in parts:
            start = offset % BLOCK_BYTES
            _read_at(fds, buffer, offset - start)
            if buffer[start : start + len(data)] != data:
                raise OSError(errno.EIO, f"bytes {offset} to {offset + len(data)} are not what was written", str(path))


def _reopen_direct(fd: int, flags: int) -> int:
    """The same file once more, past the page cache; -1 where the file system cannot do that."""
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{fd}", flags | getattr(os, "O_DIRECT", 0))
    return -1


def _open_for_reading(path: Path, within: Path | None, stack: contextlib.ExitStack) -> list[int]:
    """File descriptors for `_read_at`: a buffered one and, where the file system has it, a direct one."""
    fds = [files.open_fd(path, within=within)]
    if (direct := _reopen_direct(fds[0], os.O_RDONLY)) >= 0:
        fds.append(direct)

    def close() -> None:
        for fd in fds:
            os.close(fd)

    stack.callback(close)
    return fds


def read_blocks(path: Path, block_bytes: int, within: Path | None = None) -> Iterator[memoryview]:
    """The bytes of a file in order, `block_bytes` at a time, past the page cache where the file system can do that.

    What comes is what the disk holds, and nothing else is pushed out of memory for it. A block is only valid until the
    next one is asked for.
    """
    buffer = mmap.mmap(-1, block_bytes)  # direct reads need whole pages
    view, offset = memoryview(buffer), 0
    with contextlib.ExitStack() as stack:
        fds = _open_for_reading(path, within, stack)
        while count := _read_at(fds, buffer, offset):
            yield view[:count]
            offset += count


def _read_at(fds: list[int], buffer: mmap.mmap, offset: int) -> int:
    if len(fds) > 1 and offset % BLOCK_BYTES == 0:
        try:
            return os.preadv(fds[1], [buffer], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(fds.pop())
    return os.preadv(fds[0], [buffer], offset)
