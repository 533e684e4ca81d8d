"""Ranks that are forks of one process which has imported everything, instead of N interpreters that each do.

Importing torch and transformers takes two seconds on a fast disk, and much longer where N processes read the same
thousands of files from a network. So they are imported once. The forks are made before there is any other thread, any
open device and any connection, and wait; torch's agent starts a rank by a command and an environment, and is given the
fork that becomes just that. In /proc, to `ps` and to `pkill` it is what the command would have been.

Where anything speaks against it, the command is started as ever.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launcher.base.process import die_with_parent, show_as

_MODULE = "launcher.train"
_LIBRARIES = (
    "accelerate.utils", "transformers.modeling_utils", "launcher.agent.out_of_memory", "launcher.train.sizing",
    "launcher.train.accelerator", "launcher.train.build", "launcher.train.early_stop", "launcher.train.finish",
    "launcher.train.loop",
)  # fmt: skip
"""What `launcher.train.__main__` imports."""
_READ_AT_IMPORT = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "LD_", "PYTHON", "MALLOC_", "GLIBC_", "PYTORCH_", "CUDA_", "HF_", "TRANSFORMERS_",
)  # fmt: skip
"""Variables that an imported library has looked at. A rank that gets another value imports anew."""
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri", "/dev/accel")
_PROC = Path("/proc/self")


class ForkedRanks:
    """
    Args:
        env: under which the libraries are imported.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._waiting: list[ForkedRank] = []
        self._has_libraries = True

    def import_libraries(self) -> None:
        """What fails here fails in the ranks too, which tell it in a report of their own."""
        try:
            for name in _LIBRARIES:
                importlib.import_module(name)
        except Exception:
            self._has_libraries = False

    def fork(self, count: int) -> None:
        if not self._has_libraries or not may_fork():
            return
        for _ in range(count):
            self._waiting.append(ForkedRank(close=[rank.order_fd for rank in self._waiting]))

    def begin_in_place_of_popen(self, launch: types.ModuleType) -> None:
        """Where torch's agent, or `launch` of Accelerate for a single process, starts a rank."""
        if not self._waiting:
            return
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        if hasattr(subprocess_handler, "Popen") and hasattr(launch, "subprocess"):
            subprocess_handler.Popen = self.popen  # type: ignore[misc, assignment]
            launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": self.popen})  # type: ignore[attr-defined]

    def popen(
        self, args: Sequence[str], env: Mapping[str, str], stdout: Any = None, stderr: Any = None,
        start_new_session: bool = False,
    ) -> ForkedRank | subprocess.Popen[bytes]:  # fmt: skip
        """subprocess.Popen, for a rank's command."""
        is_plain = stdout is None and stderr is None and self._is_as_imported(env)
        arguments = arguments_of_rank(args) if is_plain else None
        while arguments is not None and self._waiting:
            rank = self._waiting.pop(0)
            if rank.begin(args, arguments, env, start_new_session):
                return rank
        return subprocess.Popen(args, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session)

    def _is_as_imported(self, env: Mapping[str, str]) -> bool:
        names = {name for name in (*self._env, *env) if name.startswith(_READ_AT_IMPORT)}
        return all(self._env.get(name) == env.get(name) for name in names)


def may_fork() -> bool:
    """Threads do not survive a fork, nor does a GPU's driver: only before there is one. And whoever looks at the forks
    must see ranks."""
    try:
        opened = [os.readlink(entry) for entry in (_PROC / "fd").iterdir() if entry.is_symlink()]  # noqa: PTH115
        if any(path.startswith(_DEVICES) for path in opened):
            return False
        if _num_threads() > 1:
            _end_threads_of_openblas()
        return _num_threads() == 1 and show_as(sys.orig_argv, os.environ)
    except OSError:
        return False


def _num_threads() -> int:
    return sum(1 for _ in (_PROC / "task").iterdir())


def _end_threads_of_openblas() -> None:
    """numpy brings them where a rank has several cores. They end before any fork, and begin again when there is work."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def arguments_of_rank(command: Sequence[str]) -> list[str] | None:
    """ARG… of `python [-u] -m launcher.train ARG…`; None for another command."""
    words = [word for word in command[1:3] if word != "-u"] + list(command[3:])
    return words[2:] if command[0] == sys.executable and words[:2] == ["-m", _MODULE] else None


class ForkedRank:
    """A process that waits to be told what it is; then as much of a Popen as its starters use.

    Args:
        close: descriptors of others that wait, which must not be kept open here.
    """

    def __init__(self, close: Sequence[int] = ()) -> None:
        parent = os.getpid()
        orders, self.order_fd = os.pipe()
        self.returncode: int | None = None
        self.args: Sequence[str] = ()
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (*close, self.order_fd):
                os.close(fd)
            _wait(orders, parent)
        os.close(orders)

    def begin(
        self, command: Sequence[str], arguments: Sequence[str], env: Mapping[str, str], is_new_session: bool
    ) -> bool:
        """
        Args:
            command: what it is to be; `arguments` are those behind the module.

        Returns:
            False where it has died.
        """
        self.args = command
        order = {"command": command, "arguments": arguments, "env": dict(env), "is_new_session": is_new_session}
        try:
            with open(self.order_fd, "wb") as pipe:  # noqa: PTH123
                pipe.write(json.dumps(order).encode())
        except BrokenPipeError:
            self.wait()
            return False
        return True

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self._reap(0 if end is None else os.WNOHANG)) is None:
            if end is not None and time.monotonic() >= end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(list(self.args), timeout)
            time.sleep(0.01)
        return code

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _wait(orders: int, parent: int) -> NoReturn:
    """In the fork: until the order comes, then what it says, which does not return."""
    code = 1
    try:
        die_with_parent(parent)
        with open(orders, "rb") as pipe:
            text = pipe.read()
        if text:
            _become(json.loads(text))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _become(order: dict[str, Any]) -> None:
    if order["is_new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    show_as(order["command"], order["env"])
    sys.orig_argv = order["command"]
    sys.argv = ["", *order["arguments"]]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]  # as by -u
    _run_module()


def _run_module() -> None:
    runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)
