"""Real launches: `launcher train` with its agent, as a user types it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from launcher.base import files
from launcher.base.paths import RunPaths
from tests.distributed.runs import lines, wait_until
from tests.distributed.zygote import environment


class Launch:
    """One `launcher train`, its output in a file."""

    def __init__(
        self, overrides: list[str], output_dir: Path, env: dict[str, str] | None = None, *, reader_gone: bool = False
    ) -> None:
        self.paths = RunPaths(output_dir)
        self._log = output_dir.with_name(f"{output_dir.name}.log")
        with open_pipe_without_reader() if reader_gone else self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher.cli", "train", *overrides, f"output_dir={output_dir}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**environment(), **(env or {})}, cwd=output_dir.parent,
            )  # fmt: skip

    def wait(self, seconds: float = 400.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.text()}") from None

    def text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.text()}"
            state = self.run_state()
            if state.get("state") != "running" or not is_running(state["pid"]):  # left by a run that was killed
                return False
            return max(lines(self.paths), default=0) >= step

        wait_until(is_there, f"step {step}", 400.0)

    def run_state(self) -> dict[str, Any]:
        value: dict[str, Any] = files.read_json_or(self.paths.run_state, {})
        return value

    def ranks(self) -> list[int]:
        """The pids of the processes that train, by rank."""
        found = {}
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")]
                if rank and b"-m" in words and words[words.index(b"-m") + 1 :][:1] == [b"launcher.train"]:
                    found[int(rank[0])] = pid
        return [found[rank] for rank in sorted(found)]

    def kill_all(self) -> None:
        """SIGKILLs everything of the run at once, as the loss of a machine does."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pid in pids:
            wait_until(lambda pid=pid: not is_running(pid), f"the death of {pid}", 30.0)  # type: ignore[misc]


def open_pipe_without_reader() -> IO[bytes]:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@contextlib.contextmanager
def launched(
    overrides: list[str], output_dir: Path, env: dict[str, str] | None = None, *, reader_gone: bool = False
) -> Iterator[Launch]:
    """Ends what is left of it, however the test ends. `reader_gone`: its output is a pipe that nobody reads."""
    launch = Launch(overrides, output_dir, env, reader_gone=reader_gone)
    try:
        yield launch
    finally:
        if launch.process.poll() is None:
            launch.kill_all()
