"""One start of `accelerate launch` on this machine: begun, watched, ended, and what it left to read."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.agent.command import accelerate_command, num_processes
from launcher.agent.head_start import shield
from launcher.agent.interface import interface_settings
from launcher.agent.machine import Ended, OneMachine, Start
from launcher.agent.stopped import StoppedProcesses
from launcher.base import files
from launcher.base.device_memory import oom_kills
from launcher.base.environment import without_inherited
from launcher.base.errors import UnsafeFileError, UserError
from launcher.base.forks import Fork
from launcher.base.paths import RunPaths
from launcher.base.process import RESTARTED, die_with_parent, host
from launcher.base.rank_reports import ATTEMPT, Report, is_library, make_report, read_reports
from launcher.base.stop_requests import SUPERVISED, read_stop
from launcher.base.timeline import BEGAN
from launcher.config.settings import RunConfig

_SHUTDOWN_S = 5
"""torchrun gives the other ranks so long once one has failed. Requests to stop go through the STOP file instead."""
_EARLY_S = 1.0
"""For ranks that are asked to stop before their first step."""
_POLL_S = 0.1
_FAILED_RANK = re.compile(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*-(\d+)")
"""In torchrun's summary. `accelerate launch` starts a single process without torchrun: the line below."""
_FAILED_SINGLE = re.compile(r"CalledProcessError.*died with <Signals\.\w+: (\d+)>")
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_WAITING = ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/graph.py")


class Attempt:
    """What every start of this machine's ranks has in common.

    Args:
        begun: an `accelerate launch` with a head start, for the first one.
    """

    def __init__(
        self, config: RunConfig, paths: RunPaths, arguments: Sequence[str], begun: Fork | None = None
    ) -> None:  # fmt: skip
        self._config, self._paths, self._arguments = config, paths, arguments
        self._begun = begun
        self._machine = config.launch.machine_rank
        self._log = paths.agent_log(self._machine)
        local = max(1, num_processes(config) // config.launch.num_machines)
        self._ranks = range(self._machine * local, (self._machine + 1) * local)

    def run(self, start: Start, machines: OneMachine, began: float) -> Ended:
        """Runs the ranks to their end, or ends them where `machines` says so.

        Args:
            began: when the command that this start belongs to began, seconds since the epoch.
        """
        try:
            temporary = tempfile.TemporaryDirectory(prefix="launcher-")
        except OSError as error:
            return self._not_begun(f"no temporary file can be made on {host()}: {error.strerror}. Set TMPDIR=FOLDER")
        try:
            self._paths.logs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = files.open_append(self._log, within=self._paths.root)
        except (OSError, UnsafeFileError) as error:
            temporary.cleanup()
            return self._not_begun(f"output_dir={self._config.output_dir} cannot be written on {host()}: {error}")
        kills_before = oom_kills()
        stacks = {rank: self._stack_bytes(rank) for rank in self._ranks}
        with log, temporary as error_dir:
            begin = log.tell()
            process = self._popen(start, error_dir, log.fileno(), began)
            stopped = StoppedProcesses(process.pid, self._config.launch.hang_timeout_s, self._ranks.start)
            try:
                code = self._watch(process, machines, start, stopped)
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output = _text_from(self._log, begin)
            return Ended(
                self._machine, host(), code, self._reports(Path(error_dir), start), self._killed(output),
                {rank: stood for rank, size in stacks.items() if (stood := self._where_it_hung(rank, size))},
                output[-4000:], oom_kills() - kills_before, stopped=stopped.at_the_end(),
            )  # fmt: skip

    def _not_begun(self, why: str) -> Ended:
        wrong = UserError(why)
        report = make_report(wrong, rank=self._ranks.start, training_began=False, step=None)
        return Ended(self._machine, host(), wrong.exit_code, [report])

    def _popen(self, start: Start, error_dir: str, log: int, began: float) -> subprocess.Popen[bytes] | Fork:
        parent = os.getpid()
        launch = self._config.launch
        inherited = without_inherited({**os.environ, **launch.env})
        network = interface_settings(launch.main_process_ip, inherited) if launch.num_machines > 1 else {}
        env = {
            **inherited, **network, SUPERVISED: "1", ATTEMPT: start.id,
            "PET_SIGNALS_TO_HANDLE": "SIGHUP", "PET_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
            BEGAN: repr(began), "LAUNCHER_ERROR_DIR": error_dir, "LAUNCHER_STDERR": f"/proc/{parent}/fd/2",
            **({RESTARTED: "1"} if start.is_restart else {}),
        }  # fmt: skip

        command = accelerate_command(self._config, self._arguments, start.port, error_dir)
        begun, self._begun = self._begun, None
        if begun is not None:
            if begun.begin(command, env, output=f"/proc/{parent}/fd/{log}"):
                return begun
            begun.end()

        def prepare() -> None:
            die_with_parent(expected_parent=parent)
            shield()

        # A session of its own: Ctrl-C reaches only us, and the ranks learn of it at a step boundary.
        return subprocess.Popen(
            command, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=prepare,
        )  # fmt: skip

    def _watch(
        self, process: subprocess.Popen[bytes] | Fork, machines: OneMachine, start: Start, stopped: StoppedProcesses
    ) -> int:
        end_at: float | None = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            grace_s = machines.grace_s()
            if machines.is_stop_asked and not self._has_begun(start):
                grace_s = _EARLY_S  # no step yet: nothing is lost, and nobody looks for STOP before the loop
            if stopped.look(lambda: machines.is_stop_asked or read_stop(self._paths.stop_file) is not None):
                grace_s = 0.0
            if grace_s is not None:
                end_at = min(time.monotonic() + grace_s, end_at if end_at is not None else float("inf"))
            if end_at is not None and time.monotonic() >= end_at:
                with contextlib.suppress(OSError):  # the ranks die with it
                    os.killpg(process.pid, signal.SIGKILL)

    def _reports(self, error_dir: Path, start: Start) -> list[Report]:
        """Of this machine's ranks; where temporary files had no room for them, the copies in output_dir."""
        if found := read_reports(error_dir):
            return found
        kept = read_reports(self._paths.logs_dir)
        return [report for report in kept if report["attempt"] == start.id and report["rank"] in self._ranks]

    def _has_begun(self, start: Start) -> bool:
        """Whether this start has come to its first step: run.json is its own from there on."""
        state = files.read_json_or(self._paths.run_state, {})
        return isinstance(state, dict) and state.get("attempt") == start.id

    def _killed(self, output: str) -> dict[int, int]:
        single = _FAILED_SINGLE.search(output)
        if single:
            return {self._ranks.start: int(single[1])}
        return {int(rank): int(number) for rank, number in _FAILED_RANK.findall(output)}

    def _stack_bytes(self, rank: int) -> int:
        try:
            return self._paths.stacks(rank).stat().st_size
        except OSError:
            return 0

    def _where_it_hung(self, rank: int, size_before: int) -> tuple[bool, str] | None:
        """As in `Ended.hung`; None where it did not hang."""
        if self._stack_bytes(rank) <= size_before:
            return None
        return where_it_stood(_text_from(self._paths.stacks(rank), size_before))


def where_it_stood(stacks: str) -> tuple[bool, str]:
    """Whether the main thread stood in a collective, waiting for others, and its innermost line outside of libraries.

    Args:
        stacks: what faulthandler wrote; the main thread comes last, its innermost line first.
    """
    frames = _FRAME.findall(stacks.rpartition("most recent call first")[2])
    is_waiting = any(room in file for file, _, _ in frames[:6] for room in _WAITING)
    own = [frame for frame in frames if not is_library(frame[0])]
    file, line, function = (own or frames or [("", "", "")])[0]
    return is_waiting, f"{function} ({file}:{line})" if file else "a place that it could not write down"


def _text_from(path: Path, start: int) -> str:
    """Empty where it cannot be read: a disk that failed must not hide what the ranks have told of it."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
