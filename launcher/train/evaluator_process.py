"""The main process's side of the process that evaluates in the background: started, followed, ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

from launcher.base import files
from launcher.base.devices import visible_gpus
from launcher.base.environment import without_inherited
from launcher.base.paths import RunPaths
from launcher.checkpoint.writer_client import Activity
from launcher.config.settings import RunConfig

MODULE = "launcher.train.evaluate_checkpoint"


class EvaluatorProcess:
    """It evaluates one checkpoint after another, and is started anew after a failure. Nothing here raises or waits.

    Attributes:
        step: of the checkpoint that it was last given; None: of none.
        error: why it failed, once it `has_ended`; None: its result is there.
    """

    def __init__(self, config: RunConfig, paths: RunPaths) -> None:
        self._config, self._paths = config, paths
        self._process: subprocess.Popen[bytes] | None = None
        self._activity: Activity | None = None
        self._pending = b""
        self.step: int | None = None
        self.error: str | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def begin(self, step: int) -> None:
        """Has it evaluate the checkpoint of a step; nothing else may be under way."""
        self.step, self.error = step, None
        try:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self.step = step
                self._start()
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(f"{step}\n".encode())
            self._activity = Activity(self._process.pid)
        except OSError as error:
            self.error = f"its process cannot be started: {error}"

    def _start(self) -> None:
        env = without_inherited(os.environ)
        device = self._config.eval.background_device
        if device is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible_gpus()[device]
        with files.open_append(self._paths.evaluation_log, within=self._paths.root) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(self._paths.root)], bufsize=0, env=env, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log,
                process_group=0,  # torchrun signals the group of a rank
            )  # fmt: skip
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def has_ended(self) -> bool:
        """Whether the evaluation that was begun has ended, well or not: see `error`. True once."""
        if self.error is None and not self._has_answered():
            return False
        if self.error is not None:
            self.close(keep_error=True)
        self.step = None
        return True

    def _has_answered(self) -> bool:
        assert self._process is not None and self._process.stdout is not None and self._activity is not None
        is_gone = self._process.poll() is not None  # before reading: what it said is in the pipe then
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                self._pending += chunk
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            if line.startswith(b'{"'):
                self.error = json.loads(line).get("error")
                return True
        limit_s = self._config.launch.hang_timeout_s
        if is_gone:
            code = self._process.returncode
            self.error = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with {code}"
        elif self._activity.standstill_s() > limit_s:
            self.error = f"its process stood still for {limit_s:.0f} s (launch.hang_timeout_s)"
        return self.error is not None

    def close(self, *, keep_error: bool = False) -> None:
        """Ends it at once: all that it leaves is whole."""
        process, self._process = self._process, None
        self.step, self._pending = None, b""
        self.error = self.error if keep_error else None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)  # a training step waits: one that hangs in a file system dies when that answers
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
