"""The file layer: every file of a run is opened, made, renamed and deleted through here. Standard library only.

A path of a run is never followed through a link: a folder may have been received from somebody, or others may write to
it too. `within` names a folder of ours (output_dir, a checkpoint): of the names below it none may be a link, while the
folder itself may be reached through links, as is normal on clusters. A pipe, socket or device where a file should be is
refused before it is opened. New files are made exclusively; what is replaced gets a name that cannot be foreseen.

`on_operation` is called before each durable operation with its name and path, so that the fault tests can kill the
process at every single one of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from launcher.base.cached_blobs import cached_blob

on_operation: Callable[[str, Path], None] | None = None

MAX_JSON_BYTES = 64 * 2**20
MAX_HISTORY_BYTES = 512 * 2**20
"""Of a trainer_state.json: the history of a long run is a few hundred bytes for every logged step."""
MAX_JSON_DEPTH = 100
_MAX_TREE_DEPTH = 64
_COPY_BYTES = 2**24
_PIECE_BYTES = 2**16
_FOLDER_FLAGS = getattr(os, "O_PATH", 0) | os.O_DIRECTORY
_ODD_KINDS = {
    stat.S_IFLNK: (errno.ELOOP, "is a link, and links are not followed here"),
    stat.S_IFDIR: (errno.EISDIR, "is a folder where a file should be"),
    stat.S_IFIFO: (errno.EINVAL, "is a pipe where a file should be"),
    stat.S_IFSOCK: (errno.EINVAL, "is a socket where a file should be"),
    stat.S_IFCHR: (errno.EINVAL, "is a device where a file should be"),
    stat.S_IFBLK: (errno.EINVAL, "is a device where a file should be"),
}
_TOO_DEEP = f"its brackets are nested deeper than {MAX_JSON_DEPTH}"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _operation(name: str, path: Path) -> None:
    if on_operation is not None:
        on_operation(name, path)


# --------------------------------------------------------------------------- opening


@contextlib.contextmanager
def _folder_of(path: Path, within: Path | None, *, create: int | None = None) -> Iterator[int]:
    """The folder that holds `path`, as a descriptor; made with the mode `create` where it is missing."""
    base = path.parent if within is None else within
    fd = os.open(base, _FOLDER_FLAGS)
    try:
        for name in path.parent.relative_to(base).parts if within is not None else ():
            if create is not None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, create, dir_fd=fd)
            inner = _open_folder_at(name, fd, _FOLDER_FLAGS, path)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _open_folder_at(name: str, parent_fd: int, flags: int, path: Path) -> int:
    if name == "..":
        raise OSError(errno.EINVAL, "leads out of its folder", str(path))
    try:
        return os.open(name, flags | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise OSError(errno.ELOOP, f"{name} is a link or a file where a folder should be", str(path)) from None
        raise


def open_fd(path: Path, flags: int = os.O_RDONLY, *, within: Path | None = None, mode: int = 0o644) -> int:
    """Opens a regular file that is no link; for reading, unless `flags` say otherwise.

    A file of a Hub cache's snapshot is read: there it is a link into the cache's own blobs. An existing file that has
    a second name (a hard link) is not written to, only appended to: copies by `cp -al` are common.

    Args:
        within: a folder below which no name of the path may be a link either.

    Raises:
        OSError: also for a link, folder, pipe, socket or device, each named.
    """
    is_write = flags & os.O_ACCMODE != os.O_RDONLY
    with _folder_of(path, within) as folder:
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode) and not is_write and (blob := cached_blob(path)) is not None:
                return open_fd(blob, flags)
            _refuse_odd(info, path)  # before it is opened: opening a device may already do something
        fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, mode, dir_fd=folder)
    try:
        info = os.fstat(fd)
        _refuse_odd(info, path)
        if is_write and not flags & os.O_APPEND and info.st_nlink > 1:
            raise OSError(errno.EMLINK, "has a second name somewhere else and is not written to", str(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def _refuse_odd(info: os.stat_result, path: Path) -> None:
    odd = _ODD_KINDS.get(stat.S_IFMT(info.st_mode))
    if odd is not None:
        raise OSError(*odd, str(path))


def open_read(path: Path, *, within: Path | None = None) -> BinaryIO:
    """A regular file for reading; see `open_fd`."""
    return os.fdopen(open_fd(path, within=within), "rb")


def create_exclusive(path: Path, *, within: Path | None = None, mode: int = 0o644) -> int:
    """Opens a new file for writing.

    Raises:
        FileExistsError: there is something of that name, a link for example.
    """
    with _folder_of(path, within) as folder:
        return os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)


def open_append(path: Path, *, within: Path | None = None, mode: int = 0o644) -> BinaryIO:
    """A regular file to add to, made where it is missing."""
    return os.fdopen(open_fd(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, within=within, mode=mode), "ab")


def make_dirs(path: Path, *, within: Path, mode: int = 0o777) -> None:
    """Makes a folder below `within`, and those above it; what is there already must be folders and no links."""
    with _folder_of(path / "-", within, create=mode):
        pass


def is_taken(path: Path) -> bool:
    """Whether anything has this name, a link to nowhere included."""
    return os.path.lexists(path)


def list_files(folder: Path) -> list[str]:
    """Everything below a folder that is no folder, by relative path, sorted. Links are listed, not followed."""
    found: list[str] = []
    pending = [PurePosixPath()]
    while pending:
        inner = pending.pop()
        if len(inner.parts) > _MAX_TREE_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"holds more than {_MAX_TREE_DEPTH} folders in each other", str(folder))
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(inner / entry.name)
                else:
                    found.append(str(inner / entry.name))
    return sorted(found)


def read_bytes(path: Path, max_bytes: int, *, within: Path | None = None) -> bytes:
    """The content of a file that has no business being longer than `max_bytes`."""
    fd = open_fd(path, within=within)
    try:
        data, wanted = b"", min(os.fstat(fd).st_size, max_bytes) + 1  # memory for max_bytes would take longer to get
        while len(data) <= max_bytes and (more := os.read(fd, wanted)):
            data += more
            wanted = min(max(wanted - len(more), _PIECE_BYTES), max_bytes + 1 - len(data))
    finally:
        os.close(fd)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"is longer than {max_bytes:,} bytes", str(path))
    return data


def read_text(path: Path, max_bytes: int = 2**20, *, within: Path | None = None) -> str:
    """Raises: OSError; ValueError: not UTF-8."""
    return read_bytes(path, max_bytes, within=within).decode("utf-8")


# --------------------------------------------------------------------------- JSON


def parse_json(data: bytes | str) -> Any:
    """JSON of a file that anybody may have written.

    Raises:
        ValueError: whatever is wrong with it; also brackets nested deeper than `MAX_JSON_DEPTH`, and half characters
            (lone surrogates), which could be neither printed nor used in a name.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Most files hold fewer brackets than may be nested.
    level, depth = [value] if text.count("[") + text.count("{") > MAX_JSON_DEPTH else [], 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(_TOO_DEEP)
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, *, within: Path | None = None) -> Any:
    """Raises: OSError, ValueError; nothing else, whatever the file is."""
    return parse_json(read_bytes(path, max_bytes, within=within))


def read_json_or(path: Path, default: Any, max_bytes: int = MAX_JSON_BYTES, *, within: Path | None = None) -> Any:
    """The content of a JSON file, or `default` where it is missing, broken, or of another type than `default`."""
    try:
        value = read_json(path, max_bytes, within=within)
    except (OSError, ValueError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


def write_json(path: Path, value: Any, *, within: Path | None = None, mode: int = 0o644) -> None:
    """Atomically replaces a JSON file."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode(), within=within, mode=mode)


# --------------------------------------------------------------------------- durable writes


def fsync_dir(path: Path) -> None:
    """Makes the names inside a folder durable. Some file systems know no fsync of folders (VirtualBox's, older SMB)."""
    _operation("fsync_dir", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def fsync_path(path: Path) -> None:
    """Makes the name of a folder durable, and those of the folders that it lies in, whoever made them.

    Those that may not be opened or synced were there before and are left out.
    """
    for folder in path.parents:
        with contextlib.suppress(OSError):
            fsync_dir(folder)


def fsync_tree(path: Path) -> None:
    """Makes everything below a folder durable, names and contents; what goes away meanwhile or is odd is left out."""
    for inner, _, names in os.walk(path):
        for file_path in (Path(inner, name) for name in names):
            with contextlib.suppress(OSError), open_read(file_path, within=path) as file:
                fsync_file(file.fileno(), file_path)
        with contextlib.suppress(OSError):
            fsync_dir(Path(inner))


def fsync_file(fd: int, path: Path) -> None:
    _operation("fsync", path)
    os.fsync(fd)


def write_at(fd: int, data: memoryview | bytes, offset: int, path: Path) -> None:
    """Writes all of `data` at a byte offset."""
    _operation("write", path)
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[: 1 << 26], offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, data: bytes, *, within: Path | None = None, mode: int = 0o644) -> None:
    """Writes a whole new file and makes its bytes (not yet its name) durable; what has its name goes away first."""
    try:
        fd = create_exclusive(path, within=within, mode=mode)
    except FileExistsError:
        remove_file(path, within=within)
        fd = create_exclusive(path, within=within, mode=mode)
    try:
        write_at(fd, data, 0, path)
        fsync_file(fd, path)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes, *, within: Path | None = None, mode: int = 0o644) -> None:
    """Atomically replaces a file, or a link by a file; after a crash either the old or the new content is there."""
    with _replacing(path) as temporary:
        write_file(temporary, data, within=within, mode=mode)


def copy_file(
    source: Path, target: Path, *, within: Path | None = None, alive: Callable[[], None] = lambda: None
) -> None:
    """Atomically replaces `target` (`within`: as always) with a copy of a regular file; calls `alive` meanwhile."""
    with _replacing(target) as temporary, open_read(source) as file:
        fd = create_exclusive(temporary, within=within)
        try:
            offset = 0
            while data := file.read(_COPY_BYTES):
                write_at(fd, data, offset, temporary)
                offset += len(data)
                alive()
            fsync_file(fd, temporary)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody can have planted something under; what is made there takes path's name."""
    temporary = path.with_name(f".{path.name}.tmp-{os.urandom(8).hex()}")
    try:
        yield temporary
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def rename(source: Path, target: Path) -> None:
    """Renames and makes both names durable."""
    _operation("rename", target)
    source.rename(target)
    fsync_dir(target.parent)


def remove_file(path: Path, *, within: Path | None = None) -> None:
    """Deletes a file, or a link itself; a missing one is fine."""
    _operation("delete", path)
    with contextlib.suppress(FileNotFoundError), _folder_of(path, within) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_tree(path: Path, *, within: Path | None = None) -> None:
    """Deletes a folder, file by file; a missing one is fine. A link is deleted itself, never what it leads to."""
    try:
        with _folder_of(path, within) as folder:
            _remove_at(folder, path, 0)
    except FileNotFoundError:
        return


def _remove_at(parent_fd: int, path: Path, depth: int) -> None:
    if depth > _MAX_TREE_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"more than {_MAX_TREE_DEPTH} folders in each other: not ours", str(path))
    info = os.stat(path.name, dir_fd=parent_fd, follow_symlinks=False)
    if not stat.S_ISDIR(info.st_mode):
        _operation("delete", path)
        os.unlink(path.name, dir_fd=parent_fd)
        return
    fd = _open_folder_at(path.name, parent_fd, os.O_RDONLY, path)
    try:
        for name in sorted(os.listdir(fd)):  # noqa: PTH208 - a descriptor
            with contextlib.suppress(FileNotFoundError):
                _remove_at(fd, path / name, depth + 1)
    finally:
        os.close(fd)
    _operation("delete", path)
    with contextlib.suppress(OSError):  # NFS keeps deleted files that are open under a name of its own
        os.rmdir(path.name, dir_fd=parent_fd)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path`."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def to_text(value: Any) -> str:
    """Plain data as the text of a JSON file."""
    return json.dumps(value, indent=1) + "\n"
