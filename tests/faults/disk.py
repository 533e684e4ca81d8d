"""What a disk may hold after a power cut, worked out from a record of all that a run asked of the kernel.

A kill leaves the page cache alone; a power cut does not. Of what is not fsynced yet, any part may be missing:

- of a file's data any set of blocks or sectors, whatever was written first; what was never written reads as zeros, or
  as what the disk held there before;
- of its length any change and all later ones;
- of a folder any set of its changed names, in any order, until that folder is fsynced. An fsync of a file makes
  its name no more durable. Only a rename is atomic in itself: the old name, or the new one (POSIX file systems promise
  that much, and nothing works without it).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_BYTES, SECTOR_BYTES = 4096, 512
Tree = dict[str, bytes | None]
"""Contents by path relative to the recorded folder; None: a folder."""


@dataclass(frozen=True)
class Operation:
    """One line of the record that `syscalls.c` writes."""

    name: str
    pid: int
    inode: int
    offset: int
    data: bytes
    path: str
    second: str

    def __str__(self) -> str:
        where = f"{self.path} → {self.second}" if self.second else self.path
        return f"{self.name} {where}" + (f" [{self.offset}, +{len(self.data)}]" if self.data else "")


def read_record(log: Path, root: Path) -> list[Operation]:
    """All operations in their order; paths relative to the recorded folder."""
    text, position, found = log.read_bytes(), 0, []
    prefix = f"{root}/"
    while position < len(text):
        end = text.index(b"\n", position)
        name, pid, inode, offset, length, path, second = text[position:end].decode().split("\t")
        position = end + 1 + int(length)
        data = text[end + 1 : position]
        path, second = (p.removesuffix(" (deleted)").removeprefix(prefix) for p in (path, second))
        found.append(Operation(name, int(pid), int(inode), int(offset), data, path, second))
    return found


@dataclass
class _File:
    """Durable bytes, and what came since: (offset, data), or (length, None) for a new length."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def whole(self) -> bytes:
        content = bytearray(self.durable)
        for offset, data in self.pending:
            _apply(content, offset, data)
        return bytes(content)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
    else:
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data


class _Folder:
    pass


_Node = _File | _Folder


@dataclass(eq=False)
class _NameChange:
    """Names that one operation sets, all or none: (folder, name, what it stands for now)."""

    sets: tuple[tuple[_Folder, str, _Node | None], ...]
    is_durable: bool = False


class Disk:
    """Follows a record and gives, at any point of it, disks that a power cut might leave.

    Args:
        root: the recorded folder, as it was before; all of it is durable. Inode numbers of what lies in it.
    """

    def __init__(self) -> None:
        self._root = _Folder()
        self._names: dict[_Folder, dict[str, _Node]] = {self._root: {}}
        self._durable: dict[_Folder, dict[str, _Node]] = {self._root: {}}
        self._changes: list[_NameChange] = []
        self._by_inode: dict[int, _Node] = {}

    # ------------------------------------------------------------------ following the record

    def apply(self, op: Operation) -> None:
        match op.name:
            case "create" | "mkdir":
                node: _Node = _File() if op.name == "create" else _Folder()
                if isinstance(node, _Folder):
                    self._names[node], self._durable[node] = {}, {}
                self._by_inode[op.inode] = node
                self._change((*self._place(op.path), node))
            case "link":
                self._change((*self._place(op.second), self._at(op.path)))
            case "rename":
                node = self._at(op.path)
                self._change((*self._place(op.path), None), (*self._place(op.second), node))
            case "unlink":
                self._change((*self._place(op.path), None))
            case "write" | "truncate":
                file = self._by_inode[op.inode]
                assert isinstance(file, _File)
                file.pending.append((op.offset, op.data if op.name == "write" else None))
            case "fsync":
                self._sync(self._root if not op.path or op.inode not in self._by_inode else self._by_inode[op.inode])
            case _:
                raise AssertionError(op)

    def _place(self, path: str) -> tuple[_Folder, str]:
        folder, _, name = path.rpartition("/")
        node = self._at(folder)
        assert isinstance(node, _Folder), path
        return node, name

    def _at(self, path: str) -> _Node:
        node: _Node = self._root
        for name in path.split("/") if path else ():
            assert isinstance(node, _Folder), path
            node = self._names[node][name]
        return node

    def _change(self, *sets: tuple[_Folder, str, _Node | None]) -> None:
        self._changes.append(_NameChange(sets))
        _set_names(self._names, sets)

    def _sync(self, node: _Node) -> None:
        if isinstance(node, _File):
            node.durable, node.pending = node.whole(), []
            return
        for change in self._changes:
            if any(folder is node for folder, _, _ in change.sets):
                change.is_durable = True
        while self._changes and self._changes[0].is_durable:
            _set_names(self._durable, self._changes.pop(0).sets)

    # ------------------------------------------------------------------ after a cut

    def everything(self) -> Tree:
        """As if nothing had been lost."""
        return self._tree(self._names, lambda file: file.whole())

    def after_cut(self, seed: int, num_random: int) -> Iterator[tuple[str, Tree]]:
        """Disks that a cut at this moment might leave, each with a name: the extremes, and draws by a seed."""
        nothing, everything = random.Random(0), random.Random(0)
        yield "nothing unsynced", self._after(nothing, 0.0, 0.0)
        yield "everything", self._after(everything, 1.0, 1.0)
        yield "names without data", self._after(nothing, 1.0, 0.0)
        yield "data without names", self._after(nothing, 0.0, 1.0)
        for draw in range(num_random):
            source = random.Random(f"{seed} {draw}")
            names, data = source.choice((0.15, 0.5, 0.85)), source.choice((0.0, 0.15, 0.5, 0.85, 1.0))
            yield f"draw {draw} of seed {seed}", self._after(source, names, data)

    def _after(self, source: random.Random, names: float, data: float) -> Tree:
        found = {folder: dict(entries) for folder, entries in self._durable.items()}
        for change in self._changes:
            if change.is_durable or source.random() < names:
                _set_names(found, change.sets)
        contents: dict[_File, bytes] = {}

        def content(file: _File) -> bytes:
            return contents.setdefault(file, _torn(file, source, data))

        return self._tree(found, content)

    def _tree(self, names: dict[_Folder, dict[str, _Node]], content) -> Tree:  # type: ignore[no-untyped-def]
        found: Tree = {}

        def walk(folder: _Folder, path: str) -> None:
            for name, node in names[folder].items():
                if isinstance(node, _File):
                    found[path + name] = content(node)
                else:
                    found[path + name] = None
                    walk(node, f"{path}{name}/")

        walk(self._root, "")
        return found


_File.__hash__ = object.__hash__  # type: ignore[method-assign,assignment]


def _set_names(names: dict[_Folder, dict[str, _Node]], sets: tuple[tuple[_Folder, str, _Node | None], ...]) -> None:
    for folder, name, node in sets:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node


def _torn(file: _File, source: random.Random, share: float) -> bytes:
    """A file's content after the cut: of what is not synced, about this share has reached the disk."""
    if not file.pending or share == 0.0:
        return file.durable
    if share == 1.0:
        return file.whole()
    piece = source.choice((SECTOR_BYTES, BLOCK_BYTES))
    lengths, content = [len(file.durable)], bytearray(file.durable)
    garbage = source.random() < 0.3
    for offset, data in file.pending:
        if data is None:
            lengths.append(offset)
            continue
        lengths.append(max(lengths[-1], offset + len(data)))
        start = 0
        while start < len(data):
            end = min(len(data), (offset + start) // piece * piece + piece - offset)
            if source.random() < share:
                _apply(content, offset + start, data[start:end])
            elif garbage:
                _apply(content, offset + start, source.randbytes(end - start))
            start = end
    length = source.choice(lengths)
    del content[length:]
    return bytes(content) + bytes(length - len(content))


def digest(tree: Tree) -> int:
    """Equal for equal disks."""
    return hash(frozenset(tree.items()))  # of bytes that most disks share, which know their hash


def write_tree(tree: Tree, root: Path) -> None:
    root.mkdir(parents=True)
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
