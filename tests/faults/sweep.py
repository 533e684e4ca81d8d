"""Kills a process, or lets the disk refuse, at every operation of a save, a publication, a push and a resume.

`python -m tests.faults.sweep ROOT MODE:ERROR,… SHARE SCENARIO…`, under the library of `syscalls.py`, forks for each
operation that a scenario asks of the kernel, and prints a JSON line for each: {"scenario", "mode", "at", "what",
"problems"}.

MODE: before, half (in the middle of a write), once, from_here (see `syscalls.MODES`). SHARE: one of so many operations
is tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.base import json_lines
from launcher.base.errors import LauncherError
from launcher.base.paths import RunPaths
from launcher.checkpoint.writer import Writer
from launcher.config.settings import RunConfig
from launcher.hub import uploader
from launcher.hub.client import SpoolHub
from launcher.hub.spool import Spool
from launcher.train.metrics import MetricsFile, RunFile
from tests.faults.file_layer import BEST, OLD, STATICS, STEP, FakeSave, retain, start_again
from tests.faults.syscalls import Trap


@dataclass
class Scenario:
    """What is done (in a fork that dies or meets an error), and what must hold afterwards."""

    name: str
    prepare: Callable[[RunPaths], None]
    act: Callable[[RunPaths], None]
    check: Callable[[RunPaths], Iterator[str]]
    """Problems right after; then it goes on as the next start does, and finds the problems of that."""


# ------------------------------------------------------------------ a save, its commit and its retention


def save_of(world_size: int, layout: str, rank: int, *, is_second: bool = False) -> Scenario:
    """The part of one process; the others have written theirs.

    Args:
        is_second: another attempt, in the temporary folder that the first one left half written.
    """
    fake = FakeSave(world_size, layout)

    def prepare(paths: RunPaths) -> None:
        for step in (BEST, OLD):
            fake.save(paths, step)
        for other in range(world_size):
            if other != rank or is_second:
                fake.writer(other, STEP).execute(fake.commands(paths, STEP, other)[0])

    def act(paths: RunPaths) -> None:
        answers = fake.part(paths, STEP, rank)
        if answers[-1]["event"] == "committed":
            answers += retain(paths)
        elif answers[-1]["event"] == "failed":  # as the engine does, once no other writer works any more
            Writer(memoryview(b"")).execute({"cmd": "discard", "step": STEP, "dir": str(paths.temporary_dir(STEP))})

    def check(paths: RunPaths) -> Iterator[str]:
        was_committed = paths.checkpoint_dir(STEP).exists()
        yield from whole(paths, fake)
        if not was_committed and not paths.checkpoint_dir(OLD).exists():
            yield "the old one was deleted before the new one was there"
        found = start_again(paths)
        if found != (STEP if was_committed else OLD):
            yield f"the next start goes on from {found}"
        yield from left_over(paths)
        step = STEP + 10 if was_committed else STEP
        answers = fake.save(paths, step)
        yield from (f"the next save: {a}" for a in answers if a["event"] == "failed")
        yield from whole(paths, fake)
        steps = [step for step, _ in paths.checkpoint_dirs()]
        if steps != [BEST, step]:
            yield f"after the next save: {steps}"

    return Scenario(f"save-{layout}-{world_size}-rank-{rank}{'-again' * is_second}", prepare, act, check)


def save_ahead(world_size: int, rank: int) -> Scenario:
    """One process writes last, and from there on the writers of all go ahead of the commands, which come later."""
    fake, plain = FakeSave(world_size), save_of(world_size, "small", rank)
    writers: dict[int, Writer] = {}

    def prepare(paths: RunPaths) -> None:
        for step in (BEST, OLD):
            fake.save(paths, step)
        for one in range(world_size):
            writers[one] = fake.writer(one, STEP)
            if one != rank:
                writers[one].execute(fake.write_ahead(paths, STEP, one))

    def act(paths: RunPaths) -> None:
        written = writers[rank].execute(fake.write_ahead(paths, STEP, rank))
        events = [answer["event"] for answer in written]
        for writer in (*writers.values(), writers[0]):
            events += [answer["event"] for answer in writer.go_ahead()] if writer.look_s is not None else []
        if "failed" not in events:  # what the processes agree on
            _, hashing, commit = fake.commands(paths, STEP, 0)
            hashed = writers[0].execute(hashing)[0]
            commit = {**commit, "hashed": hashed.get("entries", [])}
            events.append(writers[0].execute(commit)[0]["event"] if hashed["event"] == "hashed" else "failed")
        if events[-1] == "committed":
            retain(paths)
        else:
            where = {"dir": str(paths.temporary_dir(STEP)), "target": str(paths.checkpoint_dir(STEP))}
            writers[0].execute({"cmd": "discard", "step": STEP, **where})

    return Scenario(f"save-ahead-{world_size}-rank-{rank}", prepare, act, plain.check)


def whole(paths: RunPaths, fake: FakeSave) -> Iterator[str]:
    for step, folder in paths.checkpoint_dirs():
        yield from (f"{folder.name}: {problem}" for problem in fake.problems(folder, step))
    if not paths.checkpoint_dir(BEST).exists():
        yield "the best checkpoint is gone"


def left_over(paths: RunPaths) -> Iterator[str]:
    if left := [p.name for p in paths.root.iterdir() if p.name.startswith(".") and p.name != ".hub"]:
        yield f"left behind: {left}"


# ------------------------------------------------------------------ a publication


def publication(world_size: int, *, is_temporary: bool) -> Scenario:
    """From a checkpoint, or from a temporary folder that is used up; an older model is there already."""
    fake = FakeSave(world_size, "sharded")
    new = FakeSave(world_size, "small")  # with fewer files, so that the old shards have to go

    def source(paths: RunPaths) -> Path:
        return paths.root / ".tmp-checkpoint-final" if is_temporary else paths.checkpoint_dir(OLD)

    def prepare(paths: RunPaths) -> None:
        fake.save(paths, BEST)
        new.save(paths, OLD)
        _publish(paths.checkpoint_dir(BEST), paths.root, is_temporary=False)
        if is_temporary:
            shutil.copytree(paths.checkpoint_dir(OLD), source(paths))

    def act(paths: RunPaths) -> None:
        _publish(source(paths), paths.root, is_temporary=is_temporary)

    def check(paths: RunPaths) -> Iterator[str]:
        for name in (*STATICS, "model.safetensors", *(f.path for f in fake.files)):
            path = paths.root / name
            versions = [(paths.checkpoint_dir(s) / name).read_bytes() for s in (BEST, OLD)
                        if (paths.checkpoint_dir(s) / name).exists()]  # fmt: skip
            if path.exists() and path.read_bytes() not in versions:
                yield f"{name} is neither the old nor the new one"
            elif not path.exists() and name in STATICS:
                yield f"{name} is gone"
        found = start_again(paths)
        if found != OLD:
            yield f"the next start goes on from {found}"
        _publish(paths.checkpoint_dir(OLD), paths.root, is_temporary=False)
        for name in (*STATICS, "model.safetensors"):
            if (paths.root / name).read_bytes() != (paths.checkpoint_dir(OLD) / name).read_bytes():
                yield f"{name} is not published by the next start"
        if stale := [p.name for p in paths.root.glob("model-0*")]:
            yield f"of the old model: {stale}"
        yield from (f"left in {p.parent.name}: {p.name}" for p in paths.root.glob("**/.*.tmp*"))
        yield from left_over(paths)

    return Scenario(f"publish-{'temporary' if is_temporary else 'copy'}-{world_size}", prepare, act, check)


# ------------------------------------------------------------------ a push


def _publish(source: Path, root: Path, *, is_temporary: bool) -> None:
    from launcher.train.finish import publish  # with torch, which the other scenarios do without

    publish(source, root, is_temporary=is_temporary)


class Remote:
    """The other side: remembers in a file outside what has arrived. A real server: tests/hub/test_kills.py."""

    card_level, name = 0, "org/model"

    def __init__(self, path: Path) -> None:
        self.path = path

    def push(self, items: list[Any], save_journal: Callable[[], None]) -> Any:
        from launcher.hub.repo import Pushed

        for item in items:
            for file in item.files:
                content = item.source(file.path).read_bytes()
                with self.path.open("a") as out:
                    out.write(f"{item.name} {file.path} {len(content) == file.bytes} {not content.strip(b'0')}\n")
        save_journal()
        return Pushed("c0ffee", is_new=True)

    def maybe_squash(self, now: float, save_journal: Callable[[], None]) -> bool:
        return False


def _end(*args: Any, **kwargs: Any) -> bool:
    """Instead of trying again for ever, as the uploader does while a disk or the Hub does not answer."""
    raise OSError("it would wait")


def push(strategy: str) -> Scenario:
    """The trainer's side and the uploader's side of the spool, one after the other."""
    fake = FakeSave(1)

    def hub_of(paths: RunPaths) -> SpoolHub:
        config = RunConfig(output_dir=str(paths.root))
        config.hub.push_to_hub, config.hub.hub_strategy, config.hub.hub_model_id = True, strategy, "org/model"
        hub = SpoolHub(config, paths)
        hub._uploader.ensure_running = lambda: None  # type: ignore[method-assign]
        return hub

    def upload(paths: RunPaths, hub: SpoolHub) -> None:
        spool = Spool(paths.hub_dir)
        uploader.build_target = lambda *_: Remote(paths.root.with_suffix(".remote"))  # type: ignore[assignment]
        with contextlib.suppress(OSError):  # an uploader process that ends with an error is started again
            with spool.uploader_lock(0.0):
                made = uploader.Uploader(spool, hub._settings)
                made._wait = _end  # type: ignore[method-assign]
                made.run(until_empty=True)
            spool.empty_trash()
        hub._spool.release()

    def prepare(paths: RunPaths) -> None:
        fake.save(paths, BEST)
        hub = hub_of(paths)
        hub.start()
        upload(paths, hub)
        fake.save(paths, OLD)

    def act(paths: RunPaths) -> None:
        hub = hub_of(paths)
        hub.start()
        for step in (STEP, STEP + 10):
            fake.part(paths, step, 0)
            hub.checkpoint_committed(step, paths.checkpoint_dir(step))
            retain(paths)
        hub.status()
        hub.poll()
        upload(paths, hub)

    def check(paths: RunPaths) -> Iterator[str]:
        yield from whole(paths, fake)
        if (found := start_again(paths)) < OLD:
            yield f"the next start goes on from {found}"
        hub = hub_of(paths)
        hub.start()
        upload(paths, hub)
        text = paths.root.with_suffix(".remote").read_text()
        if " False " in text:
            yield f"other lengths than promised have arrived: {text}"
        steps = [s for s, _ in paths.checkpoint_dirs()]
        told = {*hub._spool.read_journal()["pushed"], *hub._spool.read_ledger()["passed_over"]}
        for step in steps if strategy == "all_checkpoints" else steps[-1:]:
            if f"checkpoint-{step}" not in told:
                yield f"checkpoint-{step} has not arrived: {hub.status()}"
            elif f"checkpoint-{step} " not in text:
                yield f"checkpoint-{step} is in the journal and has not arrived"
        if hub._spool.pending():
            yield f"still pending: {hub._spool.pending()}"
        if left := [p.name for p in paths.hub_dir.rglob("*") if "tmp" in p.name or p.parent.name == "trash"]:
            yield f"left in the spool: {left}"

    return Scenario(f"push-{strategy}", prepare, act, check)


# ------------------------------------------------------------------ a resume


def resume(world_size: int) -> Scenario:
    """A new start after two kills: a half save, a half deletion, a damaged newest checkpoint, half replaced files."""
    fake = FakeSave(world_size)

    def prepare(paths: RunPaths) -> None:
        for step in (BEST, OLD, STEP):
            fake.save(paths, step)
        fake.writer(0, STEP + 10).execute(fake.commands(paths, STEP + 10, 0)[0])
        paths.checkpoint_dir(STEP).rename(paths.checkpoint_dir(STEP + 5))  # its manifest says another step
        deleted = paths.root / ".tmp-deleted-checkpoint-5"
        deleted.mkdir()
        (deleted / "model.safetensors").write_bytes(b"half")
        (paths.root / f".run.json.tmp-{os.getpid()}").write_bytes(b"{")
        paths.metrics.write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(0, 50, 5)) + '{"step": 5')

    def act(paths: RunPaths) -> None:
        step = start_again(paths)
        MetricsFile(paths.metrics).trim(step)
        RunFile(paths, world_size).update(state="running")

    def check(paths: RunPaths) -> Iterator[str]:
        try:
            act(paths)
        except Exception as error:
            yield f"the start after it fails: {error!r}"
        point = start_again(paths)
        if point != BEST:
            yield f"the start after it goes on from {point}"
        if [line["step"] for line in json_lines.read(paths.metrics)] != [0, 5, 10]:
            yield f"metrics.jsonl: {paths.metrics.read_text()}"
        names = sorted(p.name for p in paths.root.iterdir())
        if names != ["checkpoint-10", f"checkpoint-{STEP + 5}.damaged", "metrics.jsonl", "run.json"]:
            yield f"left: {names}"

    return Scenario(f"resume-{world_size}", prepare, act, check)


def scenarios() -> dict[str, Scenario]:
    made = [
        save_of(world_size, layout, rank)
        for world_size in (1, 2, 3, 4) for layout in ("small", "direct", "sharded") for rank in range(world_size)
    ]  # fmt: skip
    made += [save_of(n, "sharded", rank, is_second=True) for n in (1, 2, 3, 4) for rank in range(n)]
    made += [save_ahead(n, rank) for n in (1, 2, 3) for rank in range(n)]
    made += [publication(n, is_temporary=is_temporary) for n in (1, 2) for is_temporary in (False, True)]
    made += [push("all_checkpoints"), push("every_save"), push("checkpoint")]
    made += [resume(n) for n in (1, 2, 3, 4)]
    return {scenario.name: scenario for scenario in made}


# ------------------------------------------------------------------ one operation after the other


@dataclass
class Result:
    scenario: str
    at: int
    what: str
    problems: list[str] = field(default_factory=list)


def _in_fork(scenario: Scenario, paths: RunPaths, arm: Callable[[], None]) -> tuple[int, str]:
    """Acts in a fork. Returns its exit code (9: killed) and what escaped it or leaked."""
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            before, problem = set(_descriptors()), ""
            arm()
            try:
                scenario.act(paths)
            except LauncherError:
                pass  # named, with what helps
            except BaseException:
                problem = traceback.format_exc()
            Trap(paths.root).disarm()
            if leaked := set(_descriptors()) - before:
                problem += f"file descriptors leak: {leaked}"
            os.write(pipe, problem.encode()[-3000:])
        os._exit(0)
    os.close(pipe)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def _descriptors() -> Iterator[tuple[str, str]]:
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this very listing
            yield path.name, str(path.readlink())


def sweep(scenario: Scenario, root: Path, mode: str, error: str, share: int) -> Iterator[Result]:
    """All operations, until the scenario runs through undisturbed."""
    with_reads = error == "EIO" and mode in ("once", "from_here")
    template, at = RunPaths(root / "template"), 0
    template.root.mkdir(parents=True)
    scenario.prepare(template)
    while True:
        paths = RunPaths(root / f"run-{at}")
        shutil.copytree(template.root, paths.root)
        if (remote := template.root.with_suffix(".remote")).exists():
            shutil.copyfile(remote, paths.root.with_suffix(".remote"))
        trap = Trap(paths.root)
        code, escaped = _in_fork(scenario, paths, lambda: trap.arm(mode, at, error, with_reads=with_reads))  # noqa: B023
        sprang, is_over = trap.what, trap.count <= at
        is_half = mode == "half" and not sprang.startswith("write")  # then the same as before it
        if is_over or (sprang and not is_half):
            result = Result(scenario.name, at, sprang)
            if mode in ("before", "half") and bool(sprang) != (code == 9):
                result.problems.append(f"ended with {code}: {escaped}")
            if escaped:
                result.problems.append(escaped)
            try:
                result.problems += scenario.check(paths)
            except Exception:
                result.problems.append(traceback.format_exc())
            yield result
        shutil.rmtree(paths.root, ignore_errors=True)
        if is_over:
            break
        at += share
    shutil.rmtree(root)


def main() -> None:
    root, modes, share, names = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4:]
    found = scenarios()
    for name in names:
        for mode, _, error in (mode.partition(":") for mode in modes):
            for result in sweep(found[name], root / f"{name}-{mode}-{error}", mode, error or "EIO", share):
                if result.what or result.problems:
                    print(json.dumps({**asdict(result), "mode": f"{mode} {error}"}), flush=True)


if __name__ == "__main__":
    main()
