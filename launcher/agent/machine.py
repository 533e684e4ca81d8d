"""One machine of a run, alone; and what the machines of several tell each other."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher import __version__
from launcher.agent.command import num_processes
from launcher.agent.requests import Requests
from launcher.base.errors import LauncherError, MachinesError, StoppedEarlyError
from launcher.base.rank_reports import Report
from launcher.config.settings import RunConfig

_SAY_S = 5.0
_SAY_AGAIN_S = 60.0
ANSWER_S = 10.0
POLL_S = 0.1
CLOSE_S = 3.0
END_SAY_S = 20.0
"""So long after this machine's own ranks have ended the others may take in silence."""
ABORT_S = 10.0
"""So long the ranks of a machine may go on once another one's have failed: to notice and write down what they saw."""


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the ranks, on all machines. `id` is in run.json, `number` counts from 0."""

    number: int
    id: str
    port: int
    is_restart: bool


@dataclasses.dataclass
class Ended:
    """How the ranks of one machine ended. Times in reports are on the clock of the process that holds this object."""

    machine: int
    host: str
    code: int
    reports: list[Report] = dataclasses.field(default_factory=list)
    killed: dict[int, int] = dataclasses.field(default_factory=dict)
    """Signal by rank, of those that a signal ended."""
    hung: dict[int, tuple[bool, str]] = dataclasses.field(default_factory=dict)
    """By rank: whether it stood in a collective, waiting for others; where it stood, in words."""
    agent_output: str = ""
    num_oom_kills: int = 0
    """Processes that the kernel killed there meanwhile, because memory was full."""
    is_lost: bool = False
    """The agent itself has gone, or does not answer."""
    stopped: dict[int, int] = dataclasses.field(default_factory=dict)
    """Pid by rank, of those that a signal had stopped until the end."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all machines do next: end with `exit_code`, or start again. `state` and `reason` are those of run.json."""

    exit_code: int
    text: str
    is_restart: bool = False
    state: str = ""
    reason: str | None = None
    is_lost: bool = False
    """A machine's agent has gone: only somebody outside can start it again."""


class OneMachine:
    """A run on one machine: nobody to agree with. Also what the first one of several builds on."""

    def __init__(self, requests: Requests, write_stop: Callable[[], None]) -> None:
        self._requests, self._write_stop = requests, write_stop

    def start(self, plan: Callable[[], Start | Verdict]) -> Start | Verdict:
        """The next start, or that there is none.

        Args:
            plan: called on the first machine, for all.
        """
        return plan()

    @property
    def is_stop_asked(self) -> bool:
        """Whether somebody has asked this machine's agent for a stop."""
        return self._requests.is_stop_asked

    def grace_s(self) -> float | None:
        """Passes requests on. So long the ranks of this machine may still run: None without a limit, 0 end them now."""
        if self._requests.is_stop_asked:
            self._write_stop()
        return 0.0 if self._requests.is_kill_asked else None

    def end(self, mine: Ended, judge: Callable[[Sequence[Ended]], Verdict]) -> Verdict:
        """What follows from how the ranks ended on all machines.

        Args:
            judge: called on the first machine, for all.
        """
        return judge([mine])

    def close(self) -> None: ...


class Wait:
    """Says after some seconds whom one waits for, and gives up in the end."""

    def __init__(self, limit_s: float, say_s: float = _SAY_S) -> None:
        now = time.monotonic()
        self._limit_s, self._deadline, self._say_at = limit_s, now + limit_s, now + say_s

    def tick(self, text: str) -> None:
        """Raises: MachinesError: the time is over."""
        now = time.monotonic()
        if now > self._deadline:
            raise MachinesError(f"gave up after launch.hang_timeout_s={self._limit_s:g}: {text}")
        if now > self._say_at:
            self._say_at = now + _SAY_AGAIN_S
            print(f"launcher: {text}", file=sys.stderr, flush=True)


def same_everywhere(config: RunConfig) -> dict[str, Any]:
    """What must not differ between the machines for their agents to work together."""
    return {
        "version": __version__,
        "run_name": config.run_name,
        "launch.num_machines": config.launch.num_machines,
        "launch.num_processes": num_processes(config),
    }


def stopped_before_start() -> LauncherError:
    return StoppedEarlyError("stopped before the start; nothing was running")
