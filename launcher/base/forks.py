"""Processes that are forked before it is known what they are to be. They wait, may import libraries meanwhile, are told
a command, an environment and an output, and become just that: in /proc, to `ps` and to `pkill` too.

A fork is made before there is any other thread, any open device and any connection, none of which it would survive.
Where something speaks against it, the command is to be started as ever. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launcher.base.output import SurvivingStream, TellingStream
from launcher.base.process import die_with_parent, show_as

_READ_AT_IMPORT = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "LD_", "PYTHON", "MALLOC_", "GLIBC_", "PYTORCH_", "CUDA_", "HF_", "TRANSFORMERS_",
)  # fmt: skip
"""Variables that an imported library, the interpreter or libc has looked at."""
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri", "/dev/accel")
_PROC = Path("/proc/self")


def may_fork() -> bool:
    """Whether nothing is here that a fork does not survive, and whoever looks at forks will see what they are."""
    try:
        opened = [os.readlink(entry) for entry in (_PROC / "fd").iterdir() if entry.is_symlink()]  # noqa: PTH115
        if any(path.startswith(_DEVICES) for path in opened):
            return False
        if _num_threads() > 1:
            _end_threads_of_openblas()
        is_plain = not _has_startup_code() and all(map(_plain_stream, (sys.stdout, sys.stderr)))
        return is_plain and _num_threads() == 1 and show_as(sys.orig_argv, os.environ)
    except OSError:
        return False


def _has_startup_code() -> bool:
    """Of somebody's own, which every interpreter runs and which may look at RANK. A distribution's lies elsewhere."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in ("sitecustomize", "usercustomize"))
    own = Path(sysconfig.get_path("stdlib")).resolve()
    return any(file is not None and Path(file).parent.resolve() != own for file in files)


def _plain_stream(stream: Any) -> io.TextIOWrapper | None:
    """Without what this package has put around it; None for a stream of somebody's own, which writes as it likes."""
    while isinstance(stream, SurvivingStream | TellingStream):
        stream = stream.stream
    return stream if isinstance(stream, io.TextIOWrapper) else None


def _num_threads() -> int:
    return sum(1 for _ in (_PROC / "task").iterdir())


def _end_threads_of_openblas() -> None:
    """numpy brings them where a rank has several cores. They end before any fork, and begin again when needed."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def arguments_behind(module: str, command: Sequence[str]) -> list[str] | None:
    """ARG… of `python [-u] -m MODULE ARG…`; None for another command."""
    words = [word for word in command[1:3] if word != "-u"] + list(command[3:])
    return words[2:] if command[0] == sys.executable and words[:2] == ["-m", module] else None


def close_inherited() -> None:
    """Descriptors that this process was started with, beyond the standard ones: a command would not have got them."""
    for fd in [int(entry.name) for entry in (_PROC / "fd").iterdir()]:
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)


class Fork:
    """Then as much of a subprocess.Popen as its starters use.

    Args:
        module: what it will run, as `python -m` would.
        meanwhile: what it does until it is told.
        close: descriptors of others that wait, which must not be kept open here.

    Raises:
        OSError: there can be no more processes, or none of this size.
    """

    def __init__(self, module: str, meanwhile: Callable[[], object] | None = None, close: Sequence[int] = ()) -> None:
        parent = os.getpid()
        orders, self.order_fd = os.pipe()
        self._module, self._env = module, dict(os.environ)
        self.returncode: int | None = None
        self.args: Sequence[str] = ()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(orders)
            os.close(self.order_fd)
            raise
        if self.pid == 0:
            for fd in (*close, self.order_fd):
                os.close(fd)
            _wait(module, orders, parent, meanwhile)
        os.close(orders)

    def begin(
        self, command: Sequence[str], env: Mapping[str, str], is_new_session: bool = False, output: str | None = None
    ) -> bool:
        """
        Args:
            output: a file that stdout and stderr are appended to, with nothing to read at stdin; None: as they are.

        Returns:
            False where the command has to be started: it is of another module, its environment differs in what was
            read already, or the fork has died.
        """
        arguments = arguments_behind(self._module, command)
        names = {name for name in (*self._env, *env) if name.startswith(_READ_AT_IMPORT)}
        if arguments is None or any(self._env.get(name) != env.get(name) for name in names):
            return False
        self.args = command
        order = {
            "command": command, "arguments": arguments, "env": dict(env), "is_new_session": is_new_session,
            "output": output,
        }  # fmt: skip
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

    def end(self) -> None:
        """Where it is not wanted."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # SIGCHLD is ignored: gone, with a code that nobody kept; as subprocess does
                pid, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _wait(module: str, orders: int, parent: int, meanwhile: Callable[[], object] | None) -> NoReturn:
    """In the fork: until the order comes, then what it says."""
    code = 1
    try:
        die_with_parent(parent)
        atexit._clear()
        if meanwhile is not None:
            meanwhile()
        with open(orders, "rb") as pipe:
            text = pipe.read()
        if text:
            _become(json.loads(text))
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        from launcher.base.secrets import redacted

        print(redacted(traceback.format_exc()), end="", file=sys.stderr, flush=True)
    finally:
        try:
            atexit._run_exitfuncs()
        finally:
            os._exit(code)


def _become(order: dict[str, Any]) -> None:
    """All but the module."""
    if order["is_new_session"]:
        os.setsid()
    if order["output"] is not None:
        null, output = os.open(os.devnull, os.O_RDONLY), os.open(order["output"], os.O_WRONLY | os.O_APPEND)
        for file, fd in ((null, 0), (output, 1), (output, 2)):
            os.dup2(file, fd)
        os.close(null)
        os.close(output)
    os.environ.clear()
    os.environ.update(order["env"])
    show_as(order["command"], order["env"])
    sys.orig_argv = order["command"]
    sys.argv = ["", *order["arguments"]]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())
    for name in ("stdout", "stderr"):
        stream = _plain_stream(getattr(sys, name))
        assert stream is not None  # by `may_fork`
        stream.reconfigure(line_buffering=True, write_through=True)  # as by -u
        setattr(sys, name, stream)
