"""What must hold after a power cut at any operation of a recorded run: checked on disks that `disk.py` works out."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.base import manifest
from launcher.base.paths import RunPaths, checkpoint_step
from launcher.checkpoint import retention
from launcher.checkpoint.resume import find
from launcher.config.settings import RunConfig
from launcher.hub.client import SpoolHub
from launcher.train.metrics import MetricsFile
from tests.faults.disk import Disk, Operation, Tree, digest, read_record, write_tree
from tests.faults.file_layer import OneProcess
from tests.hub.helpers import REPO

_RUN = "run"
_TOLD = ("uploader.log", "events.jsonl", "status.json")
"""Of the Hub's side: what only tells."""


@dataclass
class Recording:
    """A folder whose changes are recorded; `damage` adds one that the product did not make."""

    root: Path
    log: Path

    def operations(self) -> list[Operation]:
        return read_record(self.log, self.root)

    def damage(self, path: Path) -> None:
        """Flips a byte of a file, durably, as a disk that forgets."""
        with path.open("r+b") as file:
            old = file.read(1)
            file.seek(0)
            file.write(bytes([old[0] ^ 1]))
        inode = path.stat().st_ino
        with self.log.open("ab") as log:
            log.write(f"write\t0\t{inode}\t0\t1\t{path}\t\n".encode() + bytes([old[0] ^ 1]))
            log.write(f"fsync\t0\t{inode}\t0\t0\t{path}\t\n".encode())


@dataclass
class Expected:
    """What the run had told so far: it must survive."""

    newest: int = -1
    committed: frozenset[int] = frozenset()
    """Every step whose checkpoint was reported: all of them are promised to the Hub."""
    published: dict[str, bytes] = field(default_factory=dict)
    allowed: dict[str, set[bytes]] = field(default_factory=dict)
    """Of each published file: every whole version that there was."""


def _of_run(tree: Tree) -> Tree:
    """Without what cannot matter: logs, half saves, deletions."""
    left_out = (*(f"{_RUN}/{name}" for name in (".tmp-", "logs/")), *(f"{_RUN}/.hub/{name}" for name in _TOLD))
    return {path: content for path, content in tree.items() if not path.startswith(left_out)}


class PowerCuts:
    """Cuts the power after operations of a recording and checks what is left.

    Args:
        scratch: where disks are written for the check.
        num_random: draws at each cut, besides the extremes.
        shares: of the cuts right after data was written, and of all others, that are tried.
    """

    def __init__(self, recording: Recording, scratch: Path, num_random: int, shares: tuple[float, float]) -> None:
        self._recording, self._scratch = recording, scratch
        self._num_random, self._shares = num_random, shares
        self._config = RunConfig(output_dir=str(scratch / "disk" / _RUN))
        self._config.hub.push_to_hub, self._config.hub.hub_strategy = True, "all_checkpoints"
        self._config.hub.hub_model_id = REPO
        self._damaged: set[int | None] = set()
        self._seen: set[tuple[int, int | frozenset[int]]] = set()
        self._whole: dict[int, bool] = {}
        self.num_cuts = self.num_disks = self.num_checked = 0
        self.problems: list[str] = []

    def run(self) -> None:
        disk, expected, source = Disk(), Expected(), random.Random(7)
        for index, op in enumerate(self._recording.operations()):
            _note_published(disk, op, expected)
            if op.pid == 0:  # ours: see `Recording.damage`
                self._damaged.add(checkpoint_step(Path(op.path).parent))
            disk.apply(op)
            self._update(disk, op, expected)
            if source.random() >= self._shares[op.name != "write"]:
                continue
            self.num_cuts += 1
            for name, tree in disk.after_cut(index, self._num_random):
                self.num_disks += 1
                self._check(f"after operation {index} ({op}), {name}", _of_run(tree), expected)

    def _update(self, disk: Disk, op: Operation, expected: Expected) -> None:
        if op.name != "write" and op.name != "fsync" and op.name != "rename":
            return
        tree = disk.everything()
        lines = [line for line in (tree.get(f"{_RUN}/metrics.jsonl") or b"").splitlines() if b'"checkpoint"' in line]
        steps = []
        for line in lines:
            with contextlib.suppress(ValueError):
                steps.append(int(json.loads(line)["step"]))
        expected.committed |= {step for step in steps if self._is_whole(tree, step)}
        expected.newest = max((step for step in steps if self._is_whole(tree, step)), default=-1)
        state = tree.get(f"{_RUN}/run.json") or b"{}"
        if b'"finished"' in state:
            expected.published = {
                path: content for path, content in tree.items()
                if path.count("/") == 1 and path.removeprefix(f"{_RUN}/") in expected.allowed and content is not None
            }  # fmt: skip

    def _is_whole(self, tree: Tree, step: int) -> bool:
        prefix = f"{_RUN}/checkpoint-{step}/"
        part = {path: content for path, content in tree.items() if path.startswith(prefix)}
        key = digest(part)
        if key not in self._whole:
            with self._written({_RUN: None, prefix.rstrip("/"): None, **part}) as run:
                self._whole[key] = bool(part) and manifest.verify(run.checkpoint_dir(step)) == []
        return self._whole[key]

    @contextlib.contextmanager
    def _written(self, tree: Tree) -> Iterator[RunPaths]:
        folder = self._scratch / "disk"
        write_tree(tree, folder)
        try:
            yield RunPaths(folder / _RUN)
        finally:
            shutil.rmtree(folder)

    # ------------------------------------------------------------------ checks

    def _check(self, where: str, tree: Tree, expected: Expected) -> None:
        if _RUN not in tree:
            if expected.newest >= 0:
                self.problems.append(f"{where}: output_dir itself is gone")
            return
        found: list[str] = []
        self._check_published(tree, expected, found)
        hub, rest = _parts(tree)
        checks = ((rest, expected.newest, self._check_start), (hub, expected.committed, self._check_hub))
        for part, promised, check in checks:
            key = (digest(part), promised)
            if key not in self._seen:
                self._seen.add(key)
                self.num_checked += 1
                check(part, expected, found)
        self.problems += [f"{where}: {problem}" for problem in found]

    def _check_published(self, tree: Tree, expected: Expected, found: list[str]) -> None:
        for name, versions in expected.allowed.items():
            content = tree.get(f"{_RUN}/{name}")
            if content is not None and content not in versions:
                found.append(f"the published {name} is neither an old nor a new one, whole")
        for path in expected.published:
            if tree.get(path) is None:
                found.append(f"{path} was published and is gone")

    def _check_start(self, tree: Tree, expected: Expected, found: list[str]) -> None:
        """The next start: cleans up, finds its checkpoint, goes on with the metrics."""
        state = tree.get(f"{_RUN}/run.json")
        if state is not None and not _is_json(state):
            found.append("run.json is neither the old nor the new one")
        for step in _steps(tree):
            if not self._is_whole(tree, step) and step not in self._damaged:
                found.append(f"checkpoint-{step} has a valid name and is not whole")
        with self._written(tree) as run:
            retention.sweep_leftovers(run)
            try:
                point, _ = find("auto", run, OneProcess(), lambda folder: folder)  # type: ignore[arg-type]
            except Exception as error:
                found.append(f"the next start fails: {error!r}")
                return
            step = -1 if point is None else point.step
            if step < expected.newest:
                found.append(f"checkpoint-{expected.newest} was reported, the next start goes on from step {step}")
            MetricsFile(run.metrics).trim(step)

    def _check_hub(self, tree: Tree, expected: Expected, found: list[str]) -> None:
        """What is on disk has arrived, or the next start sends it, whole."""
        with self._written(tree) as run:
            hub = SpoolHub(self._config, run)
            hub.start()
            spool = hub._spool
            pushed = spool.read_journal()["pushed"]
            ready = set()
            for home in [d / n for d in (spool.queue_dir, spool.active_dir) for n in spool.names(d)]:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    item = spool.read_item(home)
                    if not any(item.problems()):
                        ready.add(item.name)
                        if (
                            item.step in self._damaged
                        ):  # the same file: what a disk changes there is found when it is sent
                            continue
                        wrong = [f.path for f in item.files if f.sha256 and _sha256(item.source(f.path)) != f.sha256]
                        found += [f"{name} of the pending {item.name} holds other bytes" for name in wrong]
            spool.release()
        found += [
            f"checkpoint-{step} has not arrived and nothing sends it"
            for step in {*_steps(tree), *expected.committed} - self._damaged
            if f"checkpoint-{step}" not in {*pushed, *ready}
            and (step in expected.committed or self._is_whole(tree, step))
        ]  # fmt: skip


def _parts(tree: Tree) -> tuple[Tree, Tree]:
    """What the Hub's side looks at, and what everything else does."""
    hub, rest = {}, {}
    for path, content in tree.items():
        is_hub = path.startswith(f"{_RUN}/.hub")
        is_checkpoint = path.startswith(f"{_RUN}/checkpoint-")
        if is_hub or is_checkpoint or path == _RUN:
            hub[path] = content
        if not is_hub and (path.count("/") == 1 or is_checkpoint or path == _RUN):
            rest[path] = content
    return hub, rest


def _steps(tree: Tree) -> list[int]:
    found = [checkpoint_step(Path(path)) for path in tree if path.count("/") == 1]
    return [step for step in found if step is not None]


def _sha256(path: Path) -> str:
    return manifest.hash_file(path).sha256


def _note_published(disk: Disk, op: Operation, expected: Expected) -> None:
    """Notes the whole content of a file when it gets its name at the top of the run."""
    name = op.second.removeprefix(f"{_RUN}/")
    if op.name == "rename" and op.second.startswith(f"{_RUN}/") and "/" not in name and _is_published(name):
        content = disk.everything().get(op.path)
        assert content is not None, op
        expected.allowed.setdefault(name, set()).add(content)


def _is_published(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".json", ".jinja") and name != "run.json"


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False
