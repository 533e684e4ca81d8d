"""The writer: a low-priority process that makes snapshots durable. Standard library only, so that it starts at once.

Started by `writer_client.WriterClient` as `python -m launcher.checkpoint.writer BUFFER_FD BYTES idle|nice`. It shares
the snapshot buffer (a memfd) with its rank, takes a JSON command per line on stdin, answers with a JSON line each:

    {"cmd": "read", "path"}                               (the command itself is in that file: too long for a pipe)
    {"cmd": "static", "files": {path: base64}}            (no answer; sent once after each start)
    {"cmd": "write", "step", "dir", "files": {path: total bytes}, "heads": {path: base64},
     "ranges": [[path, file offset, buffer offset, bytes]], "texts": {path: text}, "statics": bool,
     "piece": number, if it is one of several, of which the first has all but ranges}
                                                          → {"event": "written", "step", "seconds"}
    {"cmd": "hash", "step", "dir", "files": [path]}       → {"event": "hashed", "step", "entries": [manifest entry]}
    {"cmd": "commit", "step", "dir", "target", "world_size", "zero_stage", "files": [path], "hashed": [manifest entry]}
                                                          → {"event": "committed", "step", "bytes", "seconds"}
    {"cmd": "retain", "step", "expired": [folder], "durable": [folder]}
                                                          → {"event": "retained"}
    {"cmd": "discard", "step", "dir"}                     → {"event": "discarded"}

The last three change what a run keeps; with "fence": {path, id} they are refused where that lock has another id.
A failure answers {"event": "failed", "step", "error", "errno"}; the writer lives on. It dies with its rank.
Every answer also says whether the command `is_starved`.
After a crash at any point only `.tmp-checkpoint-*` and `.tmp-deleted-*` can remain besides whole checkpoints.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.base import block_io, files, manifest
from launcher.base.lock import is_holder
from launcher.base.process import die_with_parent, use_resting_cores, yield_cores

DELETED_PREFIX = ".tmp-deleted-"
_PATIENCE_S = 5.0


class Writer:
    """Executes the commands; one instance per writer process (or in the rank itself with `async_save=false`)."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._statics: dict[str, bytes] = {}
        self._edges: dict[Path, list[tuple[memoryview, int]]] = {}

    def set_buffer(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def static(self, command: dict[str, Any]) -> None:
        """Remembers the files that are the same in every checkpoint (config, tokenizer)."""
        self._statics = {path: base64.b64decode(data) for path, data in command["files"].items()}

    def write(self, command: dict[str, Any]) -> dict[str, Any]:
        """Writes this process's byte ranges and small files into the temporary folder, durable on return."""
        started = time.monotonic()
        folder = Path(command["dir"])
        root = folder.parent  # no name below it may be a link: others may write to output_dir too
        files.make_dirs(folder / "state", within=root)
        by_file: dict[str, list[tuple[memoryview, int]]] = {path: [] for path in command["files"]}
        for path, head in command["heads"].items():
            by_file[path].append((memoryview(base64.b64decode(head)), 0))
        for path, file_offset, buffer_offset, num_bytes in command["ranges"]:
            by_file[path].append((self._buffer[buffer_offset : buffer_offset + num_bytes], file_offset))
        is_piece = "piece" in command  # then the buffer holds the next one when edges are looked at
        if not command.get("piece"):
            self._edges = {}
        for path, ranges in by_file.items():
            if ranges:
                edges = [edge for data, offset in ranges for edge in block_io.edges(data, offset)]
                kept = [(memoryview(bytes(data)), offset) for data, offset in edges] if is_piece else edges
                self._edges.setdefault(folder / path, []).extend(kept)
                # Who writes the head also sets the length, once: all others only write inside it.
                size = command["files"][path] if path in command["heads"] else None
                _write_ranges(folder / path, size, ranges, root)
        for path, data in self._statics.items() if command["statics"] else ():
            files.make_dirs((folder / path).parent, within=root)
            files.write_file(folder / path, data, within=root)
        for path, text in command["texts"].items():
            files.write_file(folder / path, text.encode(), within=root)
        return {"event": "written", "step": command["step"], "seconds": time.monotonic() - started}

    def hash(self, command: dict[str, Any]) -> dict[str, Any]:
        """Reads this process's share of the files back, whoever wrote them, once every process has written.

        Before that its own edges: in their blocks others wrote too, and a file system that keeps such writes of two
        machines apart only by luck must not get a manifest.
        """
        edges, self._edges = self._edges, {}
        for path, parts in edges.items():
            block_io.check_bytes(path, parts, Path(command["dir"]).parent)
        hashed = manifest.hash_files(Path(command["dir"]), command["files"])
        return {"event": "hashed", "step": command["step"], "entries": [entry.to_dict() for entry in hashed]}

    def commit(self, command: dict[str, Any]) -> dict[str, Any]:
        """Main process only, once everything is hashed: manifest last, rename, fsync of the parent."""
        started = time.monotonic()
        folder, target = Path(command["dir"]), Path(command["target"])
        built = manifest.build(
            folder, step=command["step"], world_size=command["world_size"], zero_stage=command["zero_stage"],
            hashed=map(manifest.FileEntry.from_dict, command["hashed"]),
        )  # fmt: skip
        committed = {"event": "committed", "step": command["step"], "bytes": built.total_bytes}
        if files.is_taken(target):
            if not _holds(target, built):
                raise FileExistsError(f"{target} exists already and is not of this run: move it away")
            _check_fence(command)
            files.remove_tree(folder)  # the attempt before was committed after all, as its writer was ended
            return {**committed, "seconds": time.monotonic() - started}
        missing = [p for p in command["files"] if p not in {f.path for f in built.files}]
        if missing:
            raise FileNotFoundError(f"not written: {', '.join(missing)}")
        files.write_file(folder / manifest.NAME, built.to_json(), within=folder.parent)
        for inner in sorted({folder / parent for f in built.files for parent in Path(f.path).parents}, reverse=True):
            files.fsync_dir(inner)
        _check_fence(command)  # as late as possible
        files.rename(folder, target)
        return {**committed, "seconds": time.monotonic() - started}

    def retain(self, command: dict[str, Any]) -> dict[str, Any]:
        """Deletes what retention chose; renames first, so that no half checkpoint keeps a valid name.

        Retention chooses no link; one that took a folder's place since then is deleted itself, not what it leads to.
        Before anything goes, all in `durable` is made so: an upload's names for these very files, made without a wait.
        """
        for name in command["durable"]:
            files.fsync_tree(Path(name))
        for name in command["expired"]:
            _check_fence(command)
            path = Path(name)
            hidden = path.with_name(f"{DELETED_PREFIX}{path.name}")
            with contextlib.suppress(FileNotFoundError):
                files.rename(path, hidden)
            files.remove_tree(hidden)
        return {"event": "retained", "step": command["step"]}

    def discard(self, command: dict[str, Any]) -> dict[str, Any]:
        """Removes the temporary folder of a save that failed."""
        _check_fence(command)  # else it may be another run's of that name
        files.remove_tree(Path(command["dir"]))
        return {"event": "discarded", "step": command["step"]}

    def execute(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs one command and gives its answers; failures become an answer too."""
        try:
            match command["cmd"]:
                case "static":
                    self.static(command)
                    return []
                case "write":
                    return [self.write(command)]
                case "hash":
                    return [self.hash(command)]
                case "commit":
                    return [self.commit(command)]
                case "retain":
                    return [self.retain(command)]
                case _:
                    return [self.discard(command)]
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            return [
                {
                    "event": "failed",
                    "cmd": command["cmd"],
                    "step": command["step"],
                    "error": str(error),
                    "errno": number,
                }
            ]


def _check_fence(command: dict[str, Any]) -> None:
    """Raises: PermissionError, where another run has taken this run's lock over since the command was given."""
    fence = command.get("fence")
    if fence is not None and not is_holder(Path(fence["path"]), fence["id"]):
        raise PermissionError(f"{fence['path']} is no longer this run's lock")


def _holds(target: Path, built: manifest.Manifest) -> bool:
    """Whether a folder is a checkpoint of ours with the very same content."""
    try:
        return manifest.read(target) == built
    except (OSError, ValueError):
        return False


def _write_ranges(path: Path, size: int | None, ranges: list[tuple[memoryview, int]], root: Path) -> None:
    file = block_io.RangeWriter(path, size, within=root)
    try:
        for data, offset in ranges:
            file.write(data, offset)
        file.sync()
    finally:
        file.close()


def _waited_for_core_s() -> float:
    """How long the kernel has made this thread wait for a core so far; 0 where it does not count that."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def main() -> None:
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the rank decides when we end: by closing our stdin, or by dying
    fd, size = int(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3] == "idle":
        use_resting_cores()
    else:
        yield_cores()
    buffer = memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    writer = Writer(buffer)
    waited = _waited_for_core_s()
    for line in sys.stdin:
        command = json.loads(line)
        if command["cmd"] == "read":
            command = json.loads(Path(command["path"]).read_bytes())  # /proc/PID/fd/N of our own rank, a link
        answers = writer.execute(command)
        waited, waited_before = _waited_for_core_s(), waited
        for answer in answers:
            answer["is_starved"] = waited - waited_before > _PATIENCE_S
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
