"""A save of small fake processes, run with the real `Writer`; what must hold of its checkpoints. Without torch."""

from __future__ import annotations

import base64
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import block_io, manifest
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths
from launcher.checkpoint import retention
from launcher.checkpoint.layout import FileLayout, TensorSpec, plan_files
from launcher.checkpoint.resume import find
from launcher.checkpoint.writer import Writer

BEST, OLD, STEP, LIMIT = 10, 20, 30, 2
STATICS = {"config.json": b"{}", "tokenizer.json": b"{}", "chat/extra.json": b"[]"}


class OneProcess:
    """Stands in for `launcher.base.processes.Processes`, which needs torch."""

    rank, world_size, is_main = 0, 1, True

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()


def _both(shapes: list[tuple[int, int]], max_shard_bytes: int = 2**40) -> list[FileLayout]:
    """The same tensors as a model and as an optimizer's state."""
    found = []
    for stem in ("model", "state/optimizer"):
        specs = [TensorSpec(f"{stem[0]}.{i}", "F32", shape) for i, shape in enumerate(shapes)]
        found += plan_files(stem, specs, {"format": "pt"}, max_shard_bytes=max_shard_bytes)
    return found


LAYOUTS = {
    "small": _both([(50, 48), (1, 60)]),  # every edge in a block that two processes share
    "direct": _both([(600, 512)]),  # large enough for writes past the page cache, with up to four processes
    "sharded": _both([(30, 24), (1, 36), (30, 24), (1, 36)], max_shard_bytes=3000),
}


@dataclass(frozen=True)
class FakeSave:
    """What the engines of `world_size` processes tell their writers."""

    world_size: int
    layout: str = "small"

    @property
    def files(self) -> list[FileLayout]:
        return LAYOUTS[self.layout]

    def commands(self, paths: RunPaths, step: int, rank: int) -> list[dict[str, Any]]:
        """Of one process in one save: write; and of the main one then hash and commit."""
        folder = str(paths.temporary_dir(step))
        texts = {f"state/rng-{rank:05d}.json": f'{{"rank": {rank}}}'}
        if rank == 0:
            texts |= {"trainer_state.json": "{}", "state/state.json": json.dumps({"step": step})}
        heads = {f.path: base64.b64encode(f.header).decode() for f in self.files} if rank == 0 else {}
        sizes = {f.path: f.num_bytes for f in self.files}
        write = {
            "cmd": "write", "step": step, "dir": folder, "files": sizes, "heads": heads, "ranges": self._ranges(rank),
            "texts": texts, "statics": rank == 0,
        }  # fmt: skip
        hashing = {"cmd": "hash", "step": step, "dir": folder, "files": list(sizes)}
        commit = {
            "cmd": "commit", "step": step, "dir": folder, "target": str(paths.checkpoint_dir(step)),
            "world_size": self.world_size, "zero_stage": 2, "files": list(sizes), "hashed": [],
        }  # fmt: skip
        return [write, hashing, commit] if rank == 0 else [write]

    def write_ahead(self, paths: RunPaths, step: int, rank: int) -> dict[str, Any]:
        """The first of the commands, with all that a writer needs to go on by itself; the main one hashes."""
        write, *rest = self.commands(paths, step, rank)
        ahead = {
            "identity": "1", "rank": rank, "world_size": self.world_size,
            "files": rest[0]["files"] if rest else [], "commit": rest[1] if rest else None,
        }  # fmt: skip
        return {**write, "ahead": ahead}

    def _ranges(self, rank: int) -> list[list[Any]]:
        """Path, file offset, buffer offset, bytes: the buffer lies as the blocks of the files do, for direct writes."""
        ranges, position = [], 0
        for layout in self.files:
            for place in layout.places:
                share = place.spec.num_bytes // self.world_size
                offset = place.offset + rank * share
                position += (offset - position) % block_io.BLOCK_BYTES
                ranges.append([place.path, offset, position, share])
                position += share
        return ranges

    def writer(self, rank: int, step: int) -> Writer:
        """One whose snapshot holds values that belong to this rank and step."""
        _, _, position, num_bytes = self._ranges(rank)[-1]
        buffer = mmap.mmap(-1, position + num_bytes)
        buffer.write(bytes([1 + rank + step]) * len(buffer))
        writer = Writer(memoryview(buffer))
        writer.execute({"cmd": "static", "files": {k: base64.b64encode(v).decode() for k, v in STATICS.items()}})
        return writer

    def part(self, paths: RunPaths, step: int, rank: int) -> list[dict[str, Any]]:
        """Everything that one process's writer does in a save, up to the commit, or its failure; its answers."""
        writer, answers = self.writer(rank, step), list[dict[str, Any]]()
        for command in self.commands(paths, step, rank):
            if command["cmd"] == "commit":
                command = {**command, "hashed": answers[-1]["entries"]}
            answers += writer.execute(command)
            if answers[-1]["event"] == "failed":
                break
        return answers

    def save(self, paths: RunPaths, step: int) -> list[dict[str, Any]]:
        """A whole save and its retention; the answers of the main process's writer."""
        for rank in reversed(range(self.world_size)):
            answers = self.part(paths, step, rank)
            if answers[-1]["event"] == "failed":
                return answers
        return [*answers, *retain(paths)]

    def problems(self, folder: Path, step: int) -> list[str]:
        """What is wrong with a checkpoint of this step."""
        found = manifest.verify(folder)
        content = b"".join((folder / f.path).read_bytes() for f in self.files if (folder / f.path).is_file())
        missing = [rank for rank in range(self.world_size) if bytes([1 + rank + step] * 64) not in content]
        return found or [f"the values of rank {rank} are not those that were saved" for rank in missing]


def retain(paths: RunPaths) -> list[dict[str, Any]]:
    expired = retention.expired_steps(retention.our_steps(paths), LIMIT, BEST)
    names = [str(paths.checkpoint_dir(step)) for step in expired]
    return Writer(memoryview(b"")).execute({"cmd": "retain", "step": -1, "expired": names, "durable": []})


def start_again(paths: RunPaths) -> int:
    """What a new start does in output_dir; the step that it would go on from, -1 for none."""
    try:
        retention.sweep_leftovers(paths)
    except OSError as error:  # as `open_output_dir`
        raise UserError(f"output_dir={paths.root} cannot be written: {error}") from error
    point, _ = find("auto", paths, OneProcess(), lambda folder: folder)  # type: ignore[arg-type]
    return -1 if point is None else point.step
