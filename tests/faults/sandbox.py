"""A folder of which one file is changed at a time, and how what reads it then ends."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from launcher.base import files, manifest
from launcher.base.errors import LauncherError
from tests.faults.mutations import Mutator

_SLOW_S = 20.0


def read_only(action: Callable[[], Any]) -> None:
    """Runs it; anything that it does to a file is an error."""

    def refuse(name: str, path: Path) -> None:
        raise AssertionError(f"a reader does {name} on {path}")

    files.on_operation = refuse
    try:
        action()
    finally:
        files.on_operation = None


def problem_of(read: Callable[[], Any]) -> str:
    """What is wrong with how it ends: "" where it ends well, or with an error by name."""
    started, problem = time.monotonic(), ""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            read()
            stdout.flush()
            shown = stdout.buffer.getvalue()
            problem = "an escape sequence reaches the terminal" if b"\x1b[2J" in shown else ""
    except LauncherError as error:
        problem = "" if str(error) else "an error without words"
    except BaseException:
        problem = traceback.format_exc(limit=-6)
    took = time.monotonic() - started
    return problem or (f"it took {took:.0f} s" if took > _SLOW_S else "")


class Sandbox:
    """A folder whose files are known; `changed` changes one of them and puts everything back afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {name: (root / name).read_bytes() for name in files.list_files(root)}
        self._values = {
            name: torch.load(root / name, weights_only=True) for name in self.content if name.endswith(".pt")
        }

    @contextlib.contextmanager
    def changed(self, mutator: Mutator) -> Iterator[str]:
        name = mutator.random.choice(sorted(self.content))
        what = self._change(name, mutator)
        try:
            yield f"{name} {what}"
        finally:
            for path in self.root.glob("checkpoint-*.*"):  # moved aside
                path.rename(path.with_name(path.name.partition(".")[0]))
            for done in {name, *(n for n in self.content if n.endswith(manifest.NAME))}:
                path = self.root / done
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                path.unlink(missing_ok=True)
                path.write_bytes(self.content[done])

    def _change(self, name: str, mutator: Mutator) -> str:
        path = self.root / name
        if mutator.random.random() < 0.06:
            return mutator.plant(path)
        data = self.content[name]
        if name.endswith(".pt"):
            path.write_bytes(self._pickle(name, mutator))
        elif name.endswith((".json", ".lock")):
            path.write_bytes(mutator.json(data))
        elif name.endswith(".jsonl"):
            path.write_bytes(mutator.json_lines(data))
        elif name.endswith(".safetensors"):
            path.write_bytes(mutator.safetensors(data))
        else:
            path.write_bytes(mutator.bytes(data)[:5000])  # YAML takes seconds for what JSON refuses at once
        if mutator.random.random() < 0.6 and self._sign(name):
            return "with hashes that fit"
        return ""

    def _sign(self, name: str) -> bool:
        """Makes the manifest right again."""
        folder = self.root / (name.partition("/")[0] if name.startswith("checkpoint-") else "")
        own = folder / manifest.NAME
        if not own.is_file():
            return False
        if own != self.root / name:
            known = manifest.parse(self.content[str(own.relative_to(self.root))], own)
            kept = [entry for entry in known.files if folder / entry.path != self.root / name]
            own.write_bytes(
                manifest.build(
                    folder, step=known.step, world_size=known.world_size, zero_stage=known.zero_stage, hashed=kept
                ).to_json()
            )
            return True
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            raw = json.loads(own.read_bytes())
            raw.pop("manifest_sha256", None)
            own_hash = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
            own.write_text(json.dumps({**raw, "manifest_sha256": own_hash}) + "\n")
            return True
        return False

    def _pickle(self, name: str, mutator: Mutator) -> bytes:
        kind = mutator.random.random()
        if kind < 0.3:
            return mutator.bytes(self.content[name])
        if kind < 0.35:
            return _deflated(self.content[name])
        value = copy.deepcopy(self._values[name])
        try:
            value = _with_odd_tensor(value, mutator.random) if kind < 0.65 else mutator.tree(value)
            stream = io.BytesIO()
            torch.save(value, stream)
        except (RuntimeError, TypeError, ValueError, OverflowError, AttributeError):
            return mutator.bytes(self.content[name])
        return stream.getvalue()


def _deflated(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return stream.getvalue()


def _with_odd_tensor(value: Any, source: random.Random) -> Any:
    holders: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        inner = pending.pop()
        for key, item in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
            if isinstance(item, torch.Tensor):
                holders.append((inner, key))
            elif isinstance(item, (dict, list)):
                pending.append(item)
    if holders:
        holder, key = source.choice(holders)
        odd: Callable[[], Any] = source.choice(
            [
                lambda: torch.zeros(1).expand(10**10), lambda: torch.zeros(1).expand(holder[key].shape),
                lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**6,)),
                lambda: torch.zeros(0), lambda: torch.zeros(3, 3, dtype=torch.complex64), lambda: holder[key].double(),
                lambda: torch.zeros(holder[key].shape, device="meta"), lambda: holder[key].reshape(-1)[:1],
                lambda: torch.full_like(holder[key], float("nan")), lambda: holder[key].bool(), lambda: 7,
            ]
        )  # fmt: skip
        holder[key] = odd()
    return value
