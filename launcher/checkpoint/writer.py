"""The writer: a low-priority process that makes snapshots durable. Standard library only, so that it starts at once.

Started by `writer_client.WriterClient` as `python -m launcher.checkpoint.writer BUFFER_FD BYTES idle|nice`. It shares
the snapshot buffer (a memfd) with its rank, takes a JSON command per line on stdin, answers with a JSON line each:

    {"cmd": "read", "path"}                               (the command itself is in that file: too long for a pipe)
    {"cmd": "static", "files": {path: base64}}            (no answer; sent once after each start)
    {"cmd": "write", "step", "dir", "files": {path: total bytes}, "heads": {path: base64},
     "ranges": [[path, file offset, buffer offset, bytes]], "texts": {path: text}, "statics": bool,
     "piece": number, if it is one of several, of which the first has all but ranges,
     "ahead": {"identity", "rank", "world_size", "files", "commit"}, see below}
                                                          → {"event": "written", "step", "seconds"}
    {"cmd": "hash", "step", "dir", "files": [path]}       → {"event": "hashed", "step", "entries": [manifest entry]}
    {"cmd": "commit", "step", "dir", "target", "world_size", "zero_stage", "files": [path], "hashed": [manifest entry]}
                                                          → {"event": "committed", "step", "bytes", "seconds"}
    {"cmd": "retain", "step", "expired": [folder], "durable": [folder]}
                                                          → {"event": "retained"}
    {"cmd": "discard", "step", "dir"}                     → {"event": "discarded"}

The last three change what a run keeps; with "fence": {path, id} they are refused where that lock has another id.
A failure answers {"event": "failed", "step", "error", "errno"}; the writer lives on. It dies with its rank.
Every answer also says whether the command `is_starved`, and holds the command's "save", the number of the save.

**Ahead.** The processes give these commands step by step of the training, and steps take long. Where all are on one
machine the writers do what comes next as soon as it can be done: "ahead" holds what `hash` and `commit` will say, and
`notes` tell that the others are ready too. A commit of this kind is told with {"ahead": true}. The command finds done
what is done; an error ends it silently, for the command meets it again and tells it.

After a crash at any point only `.tmp-checkpoint-*` and `.tmp-deleted-*` can remain besides whole checkpoints.
"""

from __future__ import annotations

import base64
import errno
import json
import mmap
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import block_io, files, manifest
from launcher.base.lock import is_holder
from launcher.base.process import die_with_parent, use_resting_cores, yield_cores
from launcher.checkpoint import notes
from launcher.checkpoint.notes import Notes

DELETED_PREFIX = ".tmp-deleted-"
_PATIENCE_S = 5.0
_LOOK_S, _MAX_LOOK_S = 0.005, 0.25
"""How often a writer looks for the notes of the others."""


@dataclass
class _Ahead:
    """A save that is written and may go on."""

    dir: str
    files: list[str]
    commit: dict[str, Any] | None
    """On the main process."""
    notes: Notes
    look_s: float = _LOOK_S
    entries: list[dict[str, Any]] | None = None
    """Of its share of the files, once it is hashed."""
    committed: dict[str, Any] | None = None
    """The answer, once it is."""


class Writer:
    """Executes the commands; one instance per writer process (or in the rank itself with `async_save=false`)."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._statics: dict[str, bytes] = {}
        self._edges: dict[Path, list[tuple[memoryview, int]]] = {}
        self._ahead: _Ahead | None = None

    def set_buffer(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def static(self, command: dict[str, Any]) -> None:
        """Remembers the files that are the same in every checkpoint (config, tokenizer)."""
        self._statics = {path: base64.b64decode(data) for path, data in command["files"].items()}

    def write(self, command: dict[str, Any]) -> dict[str, Any]:
        """Writes this process's byte ranges and small files into the temporary folder, durable on return."""
        started = time.monotonic()
        self._ahead = None
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
        if command.get("ahead"):
            self._ahead = self._begin_ahead(command["dir"], command["ahead"])
        return {"event": "written", "step": command["step"], "seconds": time.monotonic() - started}

    def hash(self, command: dict[str, Any]) -> dict[str, Any]:
        """Reads this process's share of the files back, whoever wrote them, once every process has written.

        Before that its own edges: in their blocks others wrote too, and a file system that keeps such writes of two
        machines apart only by luck must not get a manifest.
        """
        ahead = self._ahead_of(command)
        entries = ahead.entries if ahead is not None else None
        if entries is None:
            for path, parts in self._edges.items():
                block_io.check_bytes(path, parts, Path(command["dir"]).parent)
            self._edges = {}  # only now: what failed ahead has to fail again
            entries = [entry.to_dict() for entry in manifest.hash_files(Path(command["dir"]), command["files"])]
            if ahead is not None:
                self._tell_hashed(ahead, entries)
        return {"event": "hashed", "step": command["step"], "entries": entries}

    def commit(self, command: dict[str, Any]) -> dict[str, Any]:
        """Main process only, once everything is hashed: manifest last, rename, fsync of the parent."""
        started = time.monotonic()
        ahead = self._ahead_of(command)
        if ahead is not None and ahead.committed is not None:
            return ahead.committed
        folder, target = Path(command["dir"]), Path(command["target"])
        notes.remove(folder)
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
        failed: OSError | None = None
        for name in command["expired"]:
            _check_fence(command)
            try:
                _delete(Path(name))
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return {"event": "retained", "step": command["step"]}

    def discard(self, command: dict[str, Any]) -> dict[str, Any]:
        """Removes the temporary folder of a save that failed, or what became of it ahead."""
        _check_fence(command)  # else it may be another run's of that name
        folder, ahead = Path(command["dir"]), self._ahead_of(command)
        self._ahead = None
        if ahead is not None and ahead.committed is not None:
            hidden = folder.with_name(f"{DELETED_PREFIX}{folder.name}")
            files.rename(Path(command["target"]), hidden)
            folder = hidden
        files.remove_tree(folder)
        return {"event": "discarded", "step": command["step"]}

    # ------------------------------------------------------------------ ahead of the commands

    @property
    def look_s(self) -> float | None:
        """In how many seconds to `go_ahead`, unless there is a command before; None: not at all."""
        ahead = self._ahead
        if ahead is None or ahead.committed is not None or (ahead.commit is None and ahead.entries is not None):
            return None
        return ahead.look_s

    def go_ahead(self) -> list[dict[str, Any]]:
        """Does what comes next of the save that was written, if every writer is ready for it; gives its answers."""
        ahead = self._ahead
        assert ahead is not None
        ahead.look_s = min(ahead.look_s * 1.5, _MAX_LOOK_S)
        try:
            if ahead.entries is None and ahead.notes.of_all("written") is not None:
                self.hash({"dir": ahead.dir, "files": ahead.files, "step": -1})
            if ahead.entries is None or ahead.commit is None:
                return []
            shares = ahead.notes.of_all("hashed")
            if shares is None:
                return []
            hashed = [entry for share in shares for entry in json.loads(share)]
            committed = self.commit({**ahead.commit, "hashed": hashed})
        except (OSError, ValueError):
            self._ahead = None
            return []
        ahead.committed = committed
        return [{**committed, "save": ahead.commit.get("save"), "ahead": True}]

    def _ahead_of(self, command: dict[str, Any]) -> _Ahead | None:
        return self._ahead if self._ahead is not None and self._ahead.dir == command["dir"] else None

    def _begin_ahead(self, folder: str, what: dict[str, Any]) -> _Ahead | None:
        left = Notes(Path(folder), what["identity"], what["rank"], what["world_size"])
        try:
            left.begin()
            left.leave("written")
        except OSError:
            return None
        return _Ahead(folder, what["files"], what["commit"], left)

    def _tell_hashed(self, ahead: _Ahead, entries: list[dict[str, Any]]) -> None:
        ahead.entries, ahead.look_s = entries, _LOOK_S
        try:
            ahead.notes.leave("hashed", json.dumps(entries))
        except OSError:
            self._ahead = None

    # ------------------------------------------------------------------ commands

    def execute(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs one command and gives its answers; failures become an answer too."""
        return [{**answer, "save": command.get("save")} for answer in self._execute(command)]

    def _execute(self, command: dict[str, Any]) -> list[dict[str, Any]]:
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


def _delete(path: Path) -> None:
    """Deletes a checkpoint, which has no valid name any more before the first of its files goes. overlayfs cannot
    rename a folder of a layer below: there the manifest goes first, without which it is no checkpoint."""
    hidden = path.with_name(f"{DELETED_PREFIX}{path.name}")
    try:
        files.rename(path, hidden)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        files.remove_file(path / manifest.NAME)
        files.fsync_dir(path)
        files.remove_tree(path)
    files.remove_tree(hidden)


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
    writer, commands = Writer(buffer), _Commands()
    waited = _waited_for_core_s()
    while (line := commands.next(writer.look_s)) is not None:
        if line:
            command = json.loads(line)
            if command["cmd"] == "read":
                command = json.loads(Path(command["path"]).read_bytes())  # /proc/PID/fd/N of our own rank, a link
            answers = writer.execute(command)
        else:
            answers = writer.go_ahead()
        if not answers:
            continue
        waited, waited_before = _waited_for_core_s(), waited
        for answer in answers:
            answer["is_starved"] = waited - waited_before > _PATIENCE_S
            sys.stdout.write(f"\n{json.dumps(answer)}\n")  # whatever start-up code has printed ends there
            sys.stdout.flush()


class _Commands:
    """The lines of stdin."""

    def __init__(self) -> None:
        self._pending = b""

    def next(self, timeout_s: float | None) -> bytes | None:
        """The next line; empty where none came in time, None at the end."""
        while b"\n" not in self._pending:
            if timeout_s is not None and not select.select([0], [], [], timeout_s)[0]:
                return b""
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return None
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line


if __name__ == "__main__":
    main()
