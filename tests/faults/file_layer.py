"""A save of two small fake processes, run with the real `Writer`, that dies or fails at any operation one names.

`python -m tests.faults.file_layer ROOT ROLE MODE` tries every operation of one process's part and prints one JSON line
for each. It forks from a small single-threaded process, so that hundreds of kills take seconds.

ROLE: main (its writer also commits and deletes), other, recovery (a new start, which cleans up what a kill left behind
and moves a damaged checkpoint aside). MODE: before (SIGKILL before the operation), half (SIGKILL in
the middle of a write), or the name of an errno that the operation fails with.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.base import block_io, files, manifest
from launcher.base.paths import RunPaths
from launcher.checkpoint import retention
from launcher.checkpoint.layout import TensorSpec, plan_files
from launcher.checkpoint.resume import find
from launcher.checkpoint.writer import Writer

BEST, OLD, STEP, LIMIT = 10, 20, 30, 2
WORLD_SIZE = 2
_LAYOUTS = [
    *plan_files("model", [TensorSpec("w", "F32", (400, 400)), TensorSpec("b", "F32", (100,))], {"format": "pt"}),
    *plan_files("state/optimizer", [TensorSpec("m.w", "F32", (400, 400)), TensorSpec("m.b", "F32", (100,))], {}),
]
_STATICS = {"config.json": b"{}", "chat/extra.json": b"[]"}


class OneProcess:
    """Stands in for `launcher.base.processes.Processes`, which needs torch."""

    rank, world_size, is_main = 0, 1, True

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()


def commands(paths: RunPaths, step: int, rank: int) -> list[dict[str, Any]]:
    """What the engine tells this process's writer in one save: write; and on main then hash, commit, retain."""
    import base64

    folder = paths.temporary_dir(step)
    ranges = _ranges(rank)
    texts = {f"state/rng-{rank:05d}.json": f'{{"rank": {rank}}}'}
    if rank == 0:
        texts |= {"trainer_state.json": "{}", "state/state.json": json.dumps({"step": step})}
    heads = {f.path: base64.b64encode(f.header).decode() for f in _LAYOUTS} if rank == 0 else {}
    sizes = {f.path: f.num_bytes for f in _LAYOUTS}
    write = {
        "cmd": "write", "step": step, "dir": str(folder), "files": sizes, "heads": heads, "ranges": ranges,
        "texts": texts, "statics": rank == 0,
    }  # fmt: skip
    hashing = {"cmd": "hash", "step": step, "dir": str(folder), "files": list(sizes)}
    commit = {
        "cmd": "commit", "step": step, "dir": str(folder), "target": str(paths.checkpoint_dir(step)),
        "world_size": WORLD_SIZE, "zero_stage": 2, "files": list(sizes), "hashed": [],
    }  # fmt: skip
    return [write, hashing, commit] if rank == 0 else [write]


def _ranges(rank: int) -> list[list[Any]]:
    """Path, file offset, buffer offset, bytes: the buffer lies as the blocks of the files do, for direct writes."""
    ranges, position = [], 0
    for layout in _LAYOUTS:
        for place in layout.places:
            half = place.spec.num_bytes // 2
            offset = place.offset + rank * half
            position += (offset - position) % block_io.BLOCK_BYTES
            ranges.append([place.path, offset, position, half])
            position += half
    return ranges


def new_writer(rank: int, step: int) -> Writer:
    """A writer whose snapshot holds values that belong to this rank and step."""
    import base64

    _, _, position, num_bytes = _ranges(rank)[-1]
    buffer = mmap.mmap(-1, position + num_bytes)
    buffer.write(bytes([1 + rank + step]) * len(buffer))
    writer = Writer(memoryview(buffer))
    writer.execute({"cmd": "static", "files": {k: base64.b64encode(v).decode() for k, v in _STATICS.items()}})
    return writer


def save(paths: RunPaths, step: int, best: int | None, role: str = "", arm: Callable[[], None] = lambda: None) -> Any:
    """A whole save and its retention, as the engine orders them; `arm` is called in the process of `role`.

    Each process is a fork of its own. Returns (the answers of main, those of other, their exit codes).
    """
    main = [*commands(paths, step, 0)]
    codes, answers = {}, {}
    for name, rank, work in (("other", 1, commands(paths, step, 1)), ("main", 0, main)):
        reader, pipe = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            code = 1
            try:
                if name == role:
                    arm()
                os.write(pipe, json.dumps(_work(paths, new_writer(rank, step), work, best)).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(pipe)
        with os.fdopen(reader) as stream:
            text = stream.read()
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers[name] = json.loads(text) if text else []
        if codes[name] or any(a["event"] == "failed" for a in answers[name]):
            break  # the engine commits only when every process has written
    return answers, codes


def _work(paths: RunPaths, writer: Writer, work: list[dict[str, Any]], best: int | None) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for command in work:
        if command["cmd"] == "commit":
            command = {**command, "hashed": answers[-1]["entries"]}
        answers += writer.execute(command)
        if answers[-1]["event"] == "failed":
            return answers
    if len(work) > 1:
        expired = retention.expired_steps(retention.our_steps(paths), LIMIT, best)
        names = [str(paths.checkpoint_dir(step)) for step in expired]
        answers += writer.execute({"cmd": "retain", "step": -1, "expired": names})
    return answers


class Trap:
    """Counts the operations of the file layer and springs at one of them (-1: at none)."""

    def __init__(self, at: int, mode: str) -> None:
        self._at, self._mode = at, mode
        self.count = 0

    def arm(self) -> None:
        files.on_operation = self._on_operation

    def _on_operation(self, name: str, path: Path) -> None:
        here, self.count = self.count, self.count + 1
        if here != self._at:
            return
        print(f"{name} {path.name}", file=sys.stderr, flush=True)
        if self._mode == "before" or (self._mode == "half" and name != "write"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._mode == "half":
            real = os.pwrite

            def half(fd: int, data: Any, offset: int) -> int:
                real(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError

            os.pwrite = half
        else:
            number = getattr(errno, self._mode)
            raise OSError(number, os.strerror(number), str(path))


def check(paths: RunPaths, problems: list[str], *, after_recovery: bool) -> list[int]:
    """Everything that must hold at any time; returns the whole checkpoints."""
    steps = []
    for step, folder in paths.checkpoint_dirs():
        bad = manifest.verify(folder)
        problems += [f"{folder.name} under its valid name: {p}" for p in bad]
        content = (folder / "state/optimizer.safetensors").read_bytes()
        if (not bad and bytes([1 + step] * 64) not in content) or bytes([2 + step] * 64) not in content:
            problems.append(f"{folder.name} holds other bytes than were saved")
        steps.append(step)
    if BEST not in steps:
        problems.append("the best checkpoint is gone")
    if after_recovery and (left := [p.name for p in paths.root.iterdir() if p.name.startswith(".")]):
        problems.append(f"left behind: {left}")
    return steps


def recover(paths: RunPaths, problems: list[str]) -> int:
    """What a new start does; the step it would go on from."""
    retention.sweep_leftovers(paths)
    point, notices = find("auto", paths, OneProcess(), lambda folder: folder)  # type: ignore[arg-type]
    problems += [f"notice: {n}" for n in notices]
    return -1 if point is None else point.step


def fresh(root: Path) -> RunPaths:
    paths = RunPaths(root)
    root.mkdir()
    for step in (BEST, OLD):
        answers, codes = save(paths, step, BEST)
        assert codes == {"main": 0, "other": 0} and answers["main"][2]["event"] == "committed", answers
    return paths


def damaged_and_littered(root: Path) -> RunPaths:
    """After two kills: a half save, a half deletion, a damaged newest checkpoint, half replaced small files."""
    paths = fresh(root)
    save(paths, STEP, BEST, "main", Trap(-1, "before").arm)
    commands(paths, STEP + 10, 0)
    new_writer(0, STEP + 10).execute(commands(paths, STEP + 10, 0)[0])
    files.rename(paths.checkpoint_dir(STEP), paths.checkpoint_dir(STEP + 5))  # its manifest says another step
    (root / ".tmp-deleted-checkpoint-5").mkdir()
    (root / ".tmp-deleted-checkpoint-5/model.safetensors").write_bytes(b"half")
    (root / f".run.json.tmp-{os.getpid()}").write_bytes(b"{")
    return paths


def sweep_recovery(root: Path, mode: str) -> None:
    """Kills the new start at each of its operations; the start after that must find the newest whole checkpoint."""
    at, springs = 0, True
    while springs:
        paths, problems = damaged_and_littered(root / f"recovery-{at}"), list[str]()
        pid = os.fork()
        if pid == 0:
            Trap(at, mode).arm()
            found = recover(paths, [])
            os._exit(0 if found == BEST else 99)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        springs = code < 0
        if code == 99:
            problems.append("the new start did not find the newest whole checkpoint")
        if recover(paths, []) != BEST:
            problems.append("the start after the killed one did not find the newest whole checkpoint")
        names = sorted(p.name for p in paths.root.iterdir())
        if names != ["checkpoint-10", f"checkpoint-{STEP + 5}.damaged"]:
            problems.append(f"left: {names}")
        print(json.dumps({"at": at, "committed": False, "springs": springs, "problems": problems}), flush=True)
        files.remove_tree(paths.root)
        at += 1


def main() -> None:
    root, role, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if role == "recovery":
        return sweep_recovery(root, mode)
    at, springs = 0, True
    while springs:
        paths, problems = fresh(root / f"{role}-{mode}-{at}"), list[str]()
        trap = Trap(at, mode)
        answers, codes = save(paths, STEP, BEST, role, trap.arm)
        springs = any(codes.values()) or any(a["event"] == "failed" for name in answers for a in answers[name])
        was_committed = paths.checkpoint_dir(STEP).exists()
        check(paths, problems, after_recovery=False)
        if not was_committed and not paths.checkpoint_dir(OLD).exists():
            problems.append("the old one was deleted before the new one was there")
        found = recover(paths, problems)
        if found != (STEP if was_committed else OLD):
            problems.append(f"a new start goes on from {found}")
        check(paths, problems, after_recovery=True)
        if not was_committed:  # the run that goes on makes the same save again
            answers, codes = save(paths, STEP, BEST)
            problems += [f"the next save: {a}" for n in answers for a in answers[n] if a["event"] == "failed"]
        else:
            answers, codes = save(paths, STEP + 10, BEST)
        steps = check(paths, problems, after_recovery=True)
        if steps != [BEST, STEP if not was_committed else STEP + 10]:
            problems.append(f"after the next save: {steps}")
        print(json.dumps({"at": at, "committed": was_committed, "springs": springs, "problems": problems}), flush=True)
        files.remove_tree(paths.root)
        at += 1


if __name__ == "__main__":
    main()
