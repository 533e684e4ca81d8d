"""`launcher train` on one node: builds the `accelerate launch` command, watches it, restarts it, gives the code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import yaml

from launcher.base import files, lock
from launcher.base.devices import num_cores, visible_gpus
from launcher.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RankFailedError, RunLockedError, UserError
from launcher.base.paths import RunPaths
from launcher.base.process import RESTARTED, die_with_parent, host, is_alive
from launcher.base.rank_reports import earliest_error
from launcher.base.secrets import redacted
from launcher.config.changes import changed_settings
from launcher.config.settings import RunConfig, run_length
from launcher.hub import send_left_over

_ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")
_SHUTDOWN_S = 5
"""torchrun gives the other ranks so long once one has failed. Requests to stop go through the STOP file instead."""


def num_processes(config: RunConfig) -> int:
    """Over all machines."""
    if config.launch.num_processes is not None:
        return config.launch.num_processes
    if config.strategy.name == "single":
        return 1
    return max(1, len(visible_gpus())) * config.launch.num_machines


def accelerate_command(
    config: RunConfig, arguments: Sequence[str], *, machine_rank: int | str | None = None,
    main_process_ip: str | None = None, main_process_port: int | str | None = None,
) -> list[str]:  # fmt: skip
    """The command of one node. Every flag is given, so that no default_config.yaml of the user's is read.

    Args:
        arguments: of launcher.train: overrides, or --config-file FILE.
        machine_rank, main_process_ip, main_process_port: instead of the config's (shell variables in a Slurm script).
    """
    launch, total = config.launch, num_processes(config)
    port = main_process_port if main_process_port is not None else launch.main_process_port
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_ACCELERATE_CONFIG),
        "--num_processes", str(total), "--num_machines", str(launch.num_machines), "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(_threads(total // launch.num_machines)),
    ]  # fmt: skip
    if total > 1:
        command += ["--multi_gpu", "--main_process_port", str(port if port is not None else free_port())]
    if launch.num_machines > 1:
        command += [
            "--machine_rank", str(machine_rank if machine_rank is not None else launch.machine_rank),
            "--main_process_ip", str(main_process_ip or launch.main_process_ip), "--rdzv_backend", "static",
            "--same_network", "--deepspeed_multinode_launcher", "standard",
        ]  # fmt: skip
    return [*command, "-m", "launcher.train", *arguments]


def _threads(local_processes: int) -> int:
    given = os.environ.get("OMP_NUM_THREADS")
    return int(given) if given else max(1, num_cores() // max(1, local_processes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(config: RunConfig, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Runs to the end, to a stop, or to a failure that a restart does not cure.

    Args:
        arguments: of launcher.train.
        env: added to the environment of the ranks.

    Returns:
        0 finished, 75 stopped and saved.

    Raises:
        RunLockedError: output_dir is in use. RankFailedError: a process failed; carries its own error.
    """
    paths = RunPaths(Path(config.output_dir).expanduser().resolve())
    _check_free(paths)
    if is_finished(config, paths):
        check_unchanged(config, paths)
        print(f"{paths.root} is finished: nothing to do. Its model is in that folder")
        for line in send_left_over(config, paths):
            print(line)
        return EXIT_DONE
    try:
        paths.logs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir} cannot be written: {error}") from error
    paths.stop_file.unlink(missing_ok=True)  # of an earlier run
    for attempt in range(config.launch.max_restarts + 1):
        restarted = {RESTARTED: "1"} if attempt else {}
        supervised = _Attempt(config, paths, arguments, {**config.launch.env, **(env or {}), **restarted})
        code, failure = supervised.run()
        if code in (EXIT_DONE, EXIT_STOPPED):
            return code
        assert failure is not None
        can_restart = supervised.training_began and not failure.report["is_ours"]
        if attempt == config.launch.max_restarts or not can_restart:
            raise failure
        print(f"launcher: {failure}\nlauncher: restarting from the last checkpoint "
              f"({attempt + 1} of {config.launch.max_restarts})", file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(1.0)
    raise AssertionError("unreachable")


def _check_free(paths: RunPaths) -> None:
    """Refuses at once what the ranks would refuse after ten seconds of imports; waits for ranks that are dying."""
    deadline = time.monotonic() + lock.DYING_S
    while (other := lock.holder(paths.lock)) is not None:
        parent = other.get("parent")
        is_dying = other.get("host") == host() and parent is not None and not is_alive(*parent)
        if not is_dying or time.monotonic() > deadline:
            raise RunLockedError(lock.describe(paths.root, other))
        time.sleep(0.2)


def is_finished(config: RunConfig, paths: RunPaths) -> bool:
    """Whether the run has ended and the config asks for no more steps; nothing of it needs torch."""
    state = files.read_json_or(paths.run_state, {})
    if not isinstance(state, dict) or state.get("state") != "finished":
        return False
    choice = config.checkpoint.resume_from_checkpoint
    if choice != "auto" and (choice == "never" or choice != state.get("resumed_from")):
        return False
    if state.get("stopped_early") and config.train.early_stopping_patience is not None:
        return True
    if config.train.max_steps >= 0:
        return bool(state.get("step", 0) >= config.train.max_steps)
    return bool(state.get("length") == run_length(config))


def check_unchanged(config: RunConfig, paths: RunPaths) -> None:
    """A finished run whose settings were changed since is not simply done.

    Raises:
        UserError: with the differences, and what to type for each wish.
    """
    if config.checkpoint.accept_changes:
        return
    try:
        before = yaml.safe_load(files.read_text(paths.config))
    except (OSError, ValueError, yaml.YAMLError):
        return
    changed = changed_settings(before, config) if isinstance(before, dict) else []
    if not changed:
        return
    step = files.read_json_or(paths.run_state, {}).get("step", 0)
    lines = "\n".join(f"  {line}" for line in changed)
    raise UserError(
        f"{paths.root} is finished, with other settings than these:\n{lines}\n"
        "To train a run of its own with them: output_dir=ANOTHER_FOLDER. "
        f"To go on from this one with them: checkpoint.accept_changes=true train.max_steps=N (N above {step}). "
        "To train again from the start in this folder: checkpoint.resume_from_checkpoint=never. "
        "To leave it as it is: checkpoint.accept_changes=true"
    )


class _Attempt:
    """One start of `accelerate launch`."""

    def __init__(self, config: RunConfig, paths: RunPaths, arguments: Sequence[str], env: dict[str, str]) -> None:
        self._paths = paths
        self._id = uuid.uuid4().hex
        self._command = accelerate_command(config, arguments)
        self._env = {
            **os.environ, **env, "LAUNCHER_SUPERVISED": "1", "LAUNCHER_ATTEMPT": self._id,
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
        }  # fmt: skip
        self._num_signals = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._agent_output = ""
        self.training_began = False

    def run(self) -> tuple[int, RankFailedError | None]:
        """(exit code, None) or (1, the earliest error of a rank)."""
        with tempfile.TemporaryDirectory(prefix="launcher-") as error_dir:
            stacks = self._stack_bytes()
            log_start = self._paths.agent_log.stat().st_size if self._paths.agent_log.exists() else 0
            parent = os.getpid()
            env = {**self._env, "LAUNCHER_ERROR_DIR": error_dir, "LAUNCHER_STDERR": f"/proc/{parent}/fd/2"}
            with self._paths.agent_log.open("ab") as log:
                # A session of its own: Ctrl-C reaches only us, and the ranks learn of it at a step boundary.
                self._process = subprocess.Popen(
                    self._command, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    preexec_fn=lambda: die_with_parent(expected_parent=parent),
                )  # fmt: skip
                previous = {
                    n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
                }
                try:
                    code = self._process.wait()
                finally:
                    for number, handler in previous.items():
                        signal.signal(number, handler)
                    with contextlib.suppress(OSError):
                        os.killpg(self._process.pid, signal.SIGKILL)
            self._agent_output = _text_from(self._paths.agent_log, log_start)
            return self._outcome(code, Path(error_dir), self._stack_bytes() > stacks)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        assert self._process is not None
        if self._num_signals > 1 and number == signal.SIGINT:
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            with contextlib.suppress(OSError):
                self._paths.stop_file.write_text("signal", encoding="utf-8")

    def _stack_bytes(self) -> int:
        return sum(p.stat().st_size for p in self._paths.logs_dir.glob("stacks-rank-*.txt"))

    def _outcome(self, code: int, error_dir: Path, is_hang: bool) -> tuple[int, RankFailedError | None]:
        state = files.read_json_or(self._paths.run_state, {})
        is_mine = isinstance(state, dict) and state.get("attempt") == self._id
        self.training_began = is_mine
        if is_mine and state["state"] == "finished":
            return EXIT_DONE, None
        if is_mine and state["state"] in ("interrupted", "pruned"):
            return EXIT_STOPPED, None
        error = earliest_error(error_dir) or self._unexplained(code, is_hang)
        if is_mine:
            reason = None if error.report["is_ours"] else "hang" if is_hang else "crash"
            ended = {"state": "failed", "reason": reason, "exit_code": error.exit_code, "error": str(error)}
            if self._num_signals > 1:
                ended |= {"state": "interrupted", "reason": "signal"}
            files.write_json(self._paths.run_state, {**state, **ended})
        return EXIT_FAILED, error

    def _unexplained(self, code: int, is_hang: bool) -> RankFailedError:
        """No rank has told an error of its own: it hung, was killed, or died before it could."""
        logs = self._paths.logs_dir
        killed = re.search(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*-(\d+)", self._agent_output)
        if is_hang:
            text = f"no step for launch.hang_timeout_s; where each process stood is in {logs}/stacks-rank-*.txt"
        elif self._num_signals > 1:
            text = "killed at once, as asked; the last checkpoint is whole"
        elif killed:
            cause = " (out of memory?)" if killed[2] == "9" else ""
            text = f"rank {killed[1]} was killed by signal {killed[2]}{cause}"
        else:
            tail = "\n".join(self._agent_output.strip().splitlines()[-5:])
            text = f"accelerate launch ended with {code}; see {self._paths.agent_log}\n{tail}"
        error = RankFailedError(redacted(text))
        error.report = {"is_ours": self._num_signals > 1}
        return error


def _text_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
