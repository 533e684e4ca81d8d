"""Starts ranks of `launcher.train` without importing torch each time: a process that has imported it all, and forks.

A start under `accelerate launch` costs ten seconds of imports, so only a few tests make one. Here the ranks run the
same `main` with the same environment; what is missing is the agent. `python -m tests.distributed.zygote`
reads one JSON request per line, {"argv", "num_processes", "env", "log"}, and answers {"pids": […]} and, when the ranks
have ended, {"codes": […]}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """What every start of ranks in the tests has in common."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "LAUNCHER_REPORT": "0",
    }  # fmt: skip


class Zygote:
    """The test's side."""

    def __init__(self, log: Path, env: Mapping[str, str] | None = None) -> None:
        self._stderr = log.open("ab")
        self._running: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.zygote"], cwd=ROOT, env=environment() | dict(env or {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the zygote ended with {self._process.wait()}"
        return json.loads(line)

    def start(
        self, argv: Sequence[str], num_processes: int, log: Path, env: dict[str, str] | None = None,
        folders: Sequence[Path] = (),
    ) -> list[int]:  # fmt: skip
        """Starts the ranks and returns their pids; those of a start that nobody waited for (its test failed) are ended.

        Args:
            folders: the working directory of each rank, where they are to differ.
        """
        if self._running:
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()
        request = {"argv": list(argv), "num_processes": num_processes, "log": str(log), "env": env or {}}
        request["folders"] = [str(folder) for folder in folders]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._running = self._read()["pids"]
        return list(self._running)

    def wait(self) -> list[int]:
        """The ranks' exit codes (negative: signal). A rank that fails takes the others down, as an agent would."""
        codes: list[int] = self._read()["codes"]
        self._running = []
        return codes

    def run(self, argv: Sequence[str], num_processes: int, log: Path, env: dict[str, str] | None = None) -> list[int]:
        self.start(argv, num_processes, log, env)
        return self.wait()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            stream.close()


def _serve() -> None:
    from launcher.base.process import die_with_parent
    from launcher.train import rank_setup

    die_with_parent()
    die = rank_setup.die_with_parent
    rank_setup.die_with_parent = lambda *args: None  # the libraries are imported here, before any rank exists
    rank_setup.before_imports()
    rank_setup.die_with_parent = die
    import accelerate
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.integrations import deepspeed as integration  # noqa: F401

    del accelerate
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        pids = _fork_ranks(request)
        answer({"pids": pids})
        answer({"codes": _wait_all(pids)})


def _fork_ranks(request: dict[str, Any]) -> list[int]:
    from launcher.agent.command import free_port

    count, port, pids = request["num_processes"], free_port(), []  # the kernel might give its own to others meanwhile
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _become_rank(request, rank, count, port)
        pids.append(pid)
    return pids


def _become_rank(request: dict[str, Any], rank: int, count: int, port: int) -> None:
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        if count > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "zygote",
            }  # fmt: skip
        os.environ |= request["env"]
        if request["folders"]:
            os.chdir(request["folders"][rank])
        sys.argv = ["launcher.train", *request["argv"]]
        from launcher.train.__main__ import main

        main()
    finally:
        os._exit(1)


def _wait_all(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and len(codes) < len(pids):
            time.sleep(0.2)
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
