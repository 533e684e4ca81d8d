"""One machine of a run from its start to its exit code: starts the ranks, watches, starts them again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from launcher.agent import machines, out_of_memory, outcome
from launcher.agent.attempt import Attempt
from launcher.agent.command import free_port, num_processes
from launcher.agent.interface import check_loopback
from launcher.agent.machine import Ended, OneMachine, Start, Verdict
from launcher.agent.outcome import Outcome
from launcher.agent.requests import Requests
from launcher.base import files, lock, lock_file, manifest
from launcher.base.end_report import write_end_report
from launcher.base.errors import EXIT_DONE, EXIT_STOPPED, MachinesError, RankFailedError, UserError
from launcher.base.forks import Fork
from launcher.base.paths import RunPaths
from launcher.base.process import is_alive
from launcher.base.secrets import redacted
from launcher.base.stop_requests import odd_stop, read_stop, remove_stop
from launcher.base.timeline import began_at, note_ended
from launcher.config.changes import changed_settings
from launcher.config.settings import RunConfig, run_length
from launcher.hub import send_left_over


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who started this agent, as far as it matters; the defaults are a person's terminal."""

    stop_reason: Callable[[], str] = lambda: "signal"
    """One of stop_requests.REASONS, asked when the agent gets a signal to stop."""
    removes_stop: bool = True
    """A STOP file at the start is an earlier run's; else the caller has removed that, and it may be a new request."""
    is_heard: bool = True
    """What is told of the whole run is told here; else by the first machine alone, in the same log."""
    num_restarts: int = 0
    """Of launch.max_restarts that earlier agents have used up; `note_restart` is told of each further one."""
    note_restart: Callable[[int], None] = lambda number: None


def run(config: RunConfig, arguments: Sequence[str], begun: Fork | None = None) -> int:
    """What `launcher train` does: `supervise` for a person at a terminal.

    Args:
        begun: of `head_start`.

    Returns:
        0 finished, 75 stopped and saved.

    Raises:
        RankFailedError: a process failed; its own error and exit code. And what `supervise` raises.
    """
    verdict = supervise(config, arguments, begun=begun)
    if verdict.exit_code not in (EXIT_DONE, EXIT_STOPPED):
        error = RankFailedError(redacted(verdict.text))
        error.exit_code = verdict.exit_code
        raise error
    return verdict.exit_code


def supervise(
    config: RunConfig, arguments: Sequence[str], caller: Caller | None = None, begun: Fork | None = None
) -> Verdict:
    """Runs to the end, to a stop, or to a failure that a restart does not cure; on every machine with the same end.

    Args:
        arguments: of launcher.train.

    Returns:
        How it ended; its text has been told, but for that of a failure.

    Raises:
        RunLockedError: output_dir is in use. UserError: it is finished, with other settings; or processes
            cannot meet here.
        MachinesError: the machines did not meet, or one has gone. StoppedEarlyError: stopped before the start.
    """
    _append_to_own_output()
    RunPaths(Path(config.output_dir).expanduser().resolve()).refuse_links()
    if config.launch.num_machines == 1 and (num_processes(config) > 1 or config.strategy.zero_stage):
        check_loopback()
    with Requests().installed() as requests:
        return _Supervisor(config, arguments, requests, caller or Caller(), begun).run()


def _append_to_own_output() -> None:
    """`launcher train > run.log`: the main process opens that file anew, and neither may overwrite the other."""
    for fd in (1, 2):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        except OSError:
            continue


class _Supervisor:
    def __init__(
        self, config: RunConfig, arguments: Sequence[str], requests: Requests, caller: Caller, begun: Fork | None
    ) -> None:
        self._config, self._requests, self._caller = config, requests, caller
        self._paths = RunPaths(Path(config.output_dir).expanduser().resolve())
        self._ranks = Attempt(config, self._paths, arguments, begun)
        self._is_first = config.launch.num_machines == 1 or config.launch.machine_rank == 0
        self._has_written_stop = False
        self._earlier: Outcome | None = None
        self._began = 0.0
        self._newest_before: int | None = None
        self._sizes: out_of_memory.BatchSizes | None = None
        self._num_halved = 0

    def run(self) -> Verdict:
        if self._config.launch.num_machines > 1 and (finished := self._finished()) is not None:
            if self._is_first:
                self._check_free()
            return self._conclude(finished)  # nobody to wait for
        me = machines.join(self._config, self._requests, self._write_stop, self._finished)
        try:
            for number in itertools.count():
                start = me.start(lambda number=number: self._plan(number))  # type: ignore[misc]
                if isinstance(start, Verdict):
                    return self._conclude(start)
                verdict = self._attempt(me, start)
                if not verdict.is_restart:
                    if self._is_first and not self._requests.is_kill_asked:
                        write_end_report(self._paths.root)
                    return self._conclude(verdict)
                self._tell(verdict.text)
                time.sleep(1.0)
        finally:
            me.close()
        raise AssertionError("unreachable")

    def _tell(self, text: str) -> None:
        if self._caller.is_heard:
            print(f"launcher: {text}", file=sys.stderr, flush=True)

    def _attempt(self, me: OneMachine, start: Start) -> Verdict:
        self._began = time.time() if start.is_restart else began_at()
        count, strategy = num_processes(self._config), self._config.strategy.name
        self._tell(f"starting {count} process{'es' if count > 1 else ''} ({strategy}) for {self._paths.root}")
        ended = self._ranks.run(start, me, self._began)
        if sys.stderr.isatty():
            print("\x1b[?25h", end="", file=sys.stderr, flush=True)  # the cursor, where a panel was killed
        try:
            return me.end(ended, lambda all_ended: self._judge(start, all_ended))
        except MachinesError as error:
            if (known := outcome.told_by_ranks(self._paths, start.id)) is not None:  # every machine ends with its code
                return Verdict(known.exit_code, known.text, False, known.state, known.reason)
            outcome.give_up(self._paths, start.id, str(error))
            raise

    def _plan(self, number: int) -> Start | Verdict:
        """On the first machine: what all do next."""
        if number == 0:
            self._check_free()
            if (finished := self._finished()) is not None:
                return finished
            if self._requests.is_stop_asked:
                return outcome.stopped_early(self._paths, self._caller.stop_reason())
        self._newest_before = outcome.newest_checkpoint(self._paths)
        return Start(number, uuid.uuid4().hex, free_port(), is_restart=number > 0)

    def _finished(self) -> Verdict | None:
        if not is_finished(self._config, self._paths):
            return None
        check_unchanged(self._config, self._paths)
        root = self._paths.root
        if manifest.holds_model(root):
            text = f"{root} is finished: nothing to do. Its model is in that folder"
            return Verdict(EXIT_DONE, text, state="finished")
        if outcome.newest_checkpoint(self._paths) is None:
            text = (
                f"{root} is finished: nothing to do. Its model is not in that folder any more, and no checkpoint is. "
                "To train it again from the start: checkpoint.resume_from_checkpoint=never"
            )
            return Verdict(EXIT_DONE, text, state="finished")
        self._tell(f"{root} is finished, but its model is not in that folder any more: it is taken from a checkpoint")
        return None

    def _check_free(self) -> None:
        """Refuses at once what the ranks would refuse after ten seconds of imports; waits for ranks that are dying.

        Then nobody runs here, and a STOP file is of an earlier run.
        """
        lock.wait_until_free(self._paths.lock, self._tell, may_wait=lambda: not self._requests.is_stop_asked)
        if self._caller.removes_stop and not remove_stop(self._paths.stop_file):
            self._tell(odd_stop(self._paths.stop_file))

    def _write_stop(self) -> None:
        """The ranks look for STOP at every step; the first reason stays."""
        if not self._has_written_stop:
            self._has_written_stop = True
            if read_stop(self._paths.stop_file) is not None:
                return
            try:
                files.replace_file(self._paths.stop_file, self._caller.stop_reason().encode())
            except OSError:  # a folder of that name, a full disk: the ranks are asked by a signal
                self._signal_ranks()

    def _is_stop_asked(self) -> bool:
        """While this process itself waits for the Hub; STOP is removed here, once it is obeyed."""
        is_asked = read_stop(self._paths.stop_file) is not None
        if is_asked:
            remove_stop(self._paths.stop_file)
        self._requests.is_stop_asked |= is_asked
        return self._requests.is_stop_asked

    def _signal_ranks(self) -> None:
        with contextlib.suppress(UserError):
            other = lock_file.read(self._paths.lock)
            for process in other.pids if other is not None else ():
                with contextlib.suppress(OSError):
                    if is_alive(*process):
                        os.kill(process[0], signal.SIGUSR1)  # they ignore SIGTERM

    def _judge(self, start: Start, ended: Sequence[Ended]) -> Verdict:
        """On the first machine: what follows for all from how the ranks ended."""
        found = outcome.judge(self._paths, start.id, ended, is_killed=self._requests.is_kill_asked)
        note_ended(self._paths, start.id, self._began, vars(found))
        verdict = Verdict(found.exit_code, found.text, False, found.state, found.reason, found.is_lost)
        if found.state != "failed":
            return verdict
        newest, limit = outcome.newest_checkpoint(self._paths), self._config.launch.max_restarts
        source = "the last checkpoint" if newest is not None else "the beginning (there is no checkpoint yet)"
        if (place := out_of_memory.where(found, ended)) is not None:
            if (text := self._with_less_memory(start, found, place, source)) is not None:
                return Verdict(found.exit_code, text, is_restart=True)
            found = dataclasses.replace(found, text=f"{found.text}\n  {out_of_memory.HINT}")
        number = self._caller.num_restarts + start.number - self._num_halved
        has_new = newest is not None and newest != self._newest_before
        why = outcome.why_no_restart(found, self._earlier, has_new=has_new, has_any=newest is not None)
        self._earlier = found
        if why is not None or number >= limit or self._requests.is_stop_asked:
            why = f"\n  not restarted: {why}" if why and number < limit else ""
            return dataclasses.replace(verdict, text=f"{found.text}{why}")
        self._caller.note_restart(number + 1)
        again = f"restarting from {source} ({number + 1} of {limit})"
        return dataclasses.replace(verdict, text=f"{found.text}\nlauncher: {again}", is_restart=True)

    def _with_less_memory(self, start: Start, found: Outcome, place: str, source: str) -> str | None:
        """What is said of a restart with smaller batches, which counts against no limit: each one is smaller."""
        if self._config.train.on_out_of_memory != "halve":
            return None
        sizes = out_of_memory.note(self._paths, start.id, found)
        if sizes is None or sizes[1] == self._sizes or self._requests.is_stop_asked:
            return None
        used, self._sizes = sizes
        self._num_halved += 1
        return (
            f"out of memory: {place}. Restarting from {source} with {used.change_to(self._sizes)}; the samples of a "
            "step stay the same"
        )

    def _conclude(self, verdict: Verdict) -> Verdict:
        """Shows how it ended, but for a failure, which the caller shows as one."""
        if verdict.exit_code not in (EXIT_DONE, EXIT_STOPPED):
            return verdict
        if verdict.text and self._caller.is_heard:
            print(verdict.text, flush=True)
        if verdict.exit_code == EXIT_DONE and verdict.text and self._is_first:
            for line in send_left_over(self._config, self._paths, self._is_stop_asked):
                print(line)
        return verdict


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
        step = state.get("step", 0)
        return isinstance(step, int) and step >= config.train.max_steps
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
    step = files.read_json_or(paths.run_state, {}).get("step", 0)
    if isinstance(step, int) and 0 <= config.train.max_steps < step:
        changed.append(f"train.max_steps: {step} steps in the run, {config.train.max_steps} now")
    if not changed:
        return
    lines = "\n".join(f"  {line}" for line in changed)
    raise UserError(
        f"{paths.root} is finished, with other settings than these:\n{lines}\n"
        "To train a run of its own with them: output_dir=ANOTHER_FOLDER. "
        f"To go on from this one with them: checkpoint.accept_changes=true train.max_steps=N (N above {step}). "
        "To train again from the start in this folder: checkpoint.resume_from_checkpoint=never. "
        "To leave it as it is: checkpoint.accept_changes=true"
    )
