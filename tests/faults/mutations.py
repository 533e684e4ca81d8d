"""Seeded mutations of what a received folder holds: JSON by its structure, headers, bytes, and kinds of file."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Mutator:
    """Odd values at random places. `outside`: a file that must not be touched, whose names and links are tried."""

    def __init__(self, seed: str, outside: Path) -> None:
        self.random = random.Random(seed)
        self._outside = outside

    def value(self) -> Any:
        deep: Any = 1
        for _ in range(self.random.choice((3, 120))):
            deep = [deep]
        return self.random.choice(
            [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**18, 10**400, 1.5, -0.0, float("inf"), float("nan"), "",
             "x", str(self._outside), f"../../{self._outside.parent.name}/{self._outside.name}", "..", "/", "a\0b",
             "\ud800", "é" * 300, "[/x]", "\x1b[2J", "checkpoint-10", "manifest.json", [], {}, [[]], deep,
             {"a": 1}, [1, "2"], {"": None}, "0" * 64]
        )  # fmt: skip

    def tree(self, value: Any) -> Any:
        """One or a few nodes of plain containers changed; `value` itself stays as it is."""
        root = [copy.deepcopy(value)]
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self._change(root)
        return root[0]

    def _change(self, root: list[Any]) -> None:
        holder: Any = root
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                return
            key = self.random.choice(keys)
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or self.random.random() < 0.15:
                break
            holder = inner
        match self.random.randrange(6):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(inner))
            case 1:
                holder[str(self.value())[:20]] = inner
            case 2:
                holder[key] = [inner]
            case _:
                holder[key] = self.value()

    def json(self, data: bytes) -> bytes:
        if self.random.random() < 0.15:
            return self.bytes(data)
        try:
            return json.dumps(self.tree(json.loads(data))).encode()
        except ValueError:  # an integer too long for text
            return self.bytes(data)

    def json_lines(self, data: bytes) -> bytes:
        lines = data.splitlines()
        at = self.random.randrange(len(lines))
        return b"\n".join([*lines[:at], self.json(lines[at]), *lines[at + 1 :]]) + b"\n"

    def safetensors(self, data: bytes) -> bytes:
        """The header changed by its structure, or its length, or any byte."""
        (length,) = struct.unpack("<Q", data[:8])
        kind = self.random.random()
        if kind < 0.7:
            text = self.json(data[8 : 8 + length])
            return struct.pack("<Q", len(text)) + text + data[8 + length :]
        if kind < 0.8:
            return struct.pack("<Q", self.random.choice((0, 1, length + 8, 2**40, 2**63, 2**64 - 1))) + data[8:]
        return self.bytes(data)

    def bytes(self, data: bytes) -> bytes:
        position = self.random.randrange(len(data) + 1)
        match self.random.randrange(40):
            case n if n < 10:
                return data[:position]
            case n if n < 14:
                return b""
            case n if n < 20:
                return data[:position] + self.random.randbytes(8) + data[position:]
            case 20:
                return b"[" * self.random.choice((200, 2000, 100_000))
            case 21:
                return b'{"a":' * 300 + b"1" + b"}" * 300
            case _:
                changed = bytearray(data)
                for _ in range(self.random.choice((1, 1, 8)) if data else 0):
                    changed[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                return bytes(changed)

    def plant(self, path: Path) -> str:
        """Puts something in a file's place that is none."""
        kinds: dict[str, Callable[[], Any]] = {
            "link": lambda: path.symlink_to(self._outside),
            "folder link": lambda: path.symlink_to(self._outside.parent),
            "dangling link": lambda: path.symlink_to("nowhere"),
            "own link": lambda: path.symlink_to(path.name),
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "socket": lambda: _socket(path),
            "nothing": lambda: None,
        }
        kind = self.random.choice(list(kinds))
        path.unlink()
        kinds[kind]()
        return kind


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # whole paths of tests are too long for a socket's name
    finally:
        made.close()
        os.close(here)
