"""The machines of one run and how their agents agree: to start together, to end together, on one exit code.

The agents meet over TCP at launch.main_process_ip and main_process_port, not through files in output_dir: a killed
agent closes its connection at once on any file system, nothing stale is left by an earlier start, no clocks are
compared, and they still understand each other where the machines do not share output_dir. The ranks meet at a port of
their own, which the first machine chooses anew for every start.

    others → first   hello              who I am; answered by welcome, refused or busy
    first → others   start              an attempt begins: its id and the ranks' port
    others → first   stop, kill         somebody asked this machine
    first → others   abort, kill        end your ranks
    others → first   ended              how my ranks ended
    first → others   verdict            the run ends with this, or starts again
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher import __version__
from launcher.agent.channel import Channel
from launcher.agent.command import num_processes
from launcher.agent.requests import Requests
from launcher.base.errors import EXIT_FAILED, LauncherError, MachinesError, StoppedEarlyError, UserError
from launcher.base.process import host
from launcher.base.rank_reports import Report
from launcher.config.settings import RunConfig

_SAY_S = 5.0
_SAY_AGAIN_S = 60.0
_ANSWER_S = 10.0
_BIND_S = 10.0
_POLL_S = 0.1
_CLOSE_S = 3.0
ABORT_S = 10.0
"""So long the ranks of a machine may go on once another one's have failed: to notice and write down what they saw."""
_ENDED_S = 60.0
"""So long an agent may take, after `abort`, to say that its ranks have ended."""


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


class FirstMachine(OneMachine):
    """machine_rank 0 of several: the others connect to it, and it decides."""

    def __init__(self, config: RunConfig, requests: Requests, write_stop: Callable[[], None]) -> None:
        super().__init__(requests, write_stop)
        self._config = config
        self._listener = _listen(config)
        self._strangers: list[tuple[Channel, float]] = []
        self._others: dict[int, Channel] = {}
        self._hosts = {0: host()}
        self._ended: dict[int, Ended] = {}
        self._is_aborting = self._is_killing = False
        self._has_met = False

    @property
    def _missing(self) -> list[int]:
        return [n for n in range(1, self._config.launch.num_machines) if n not in self._others]

    def start(self, plan: Callable[[], Start | Verdict]) -> Start | Verdict:
        try:
            if not self._has_met:
                self._meet()
            planned = plan()
        except LauncherError as error:
            self._tell("verdict", **dataclasses.asdict(Verdict(error.exit_code, str(error))))
            raise
        self._ended, self._is_aborting = {}, False
        self._tell("start" if isinstance(planned, Start) else "verdict", **dataclasses.asdict(planned))
        return planned

    def _meet(self) -> None:
        """Waits for all machines.

        Raises:
            MachinesError: they did not come within launch.hang_timeout_s, or somebody asked to stop.
        """
        launch = self._config.launch
        wait = _Wait(launch.hang_timeout_s)
        while self._missing:
            self._answer_strangers()
            for number, channel in list(self._others.items()):
                is_stopped = any(message["kind"] == "stop" for message in channel.receive())
                if is_stopped or self._requests.is_stop_asked:
                    raise _stopped_before_start()
                if channel.is_lost:  # it may come again
                    self._drop(number)
            if self._requests.is_stop_asked:
                raise _stopped_before_start()
            names = " and ".join(f"machine {n}" for n in self._missing)
            wait.tick(
                f"waiting for {names} of launch.num_machines={launch.num_machines}, each with its own "
                f"launch.machine_rank, at launch.main_process_ip={launch.main_process_ip} "
                f"launch.main_process_port={launch.main_process_port}"
            )
        self._has_met = True

    def _drop(self, number: int) -> None:
        self._others.pop(number).close()

    def _answer_strangers(self) -> None:
        """Takes in who connects, with no wait for any of them."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._strangers.append((Channel(connection), time.monotonic() + _ANSWER_S))
        for channel, deadline in list(self._strangers):
            hello = next((message for message in channel.receive() if message["kind"] == "hello"), None)
            if hello is None and not channel.is_lost and time.monotonic() < deadline:
                continue
            self._strangers.remove((channel, deadline))
            answer, text = self._answer(hello) if hello else ("refused", "")
            channel.send(answer, text=text, host=host())
            if hello and answer == "welcome":
                self._others[hello["machine"]], self._hosts[hello["machine"]] = channel, hello["host"]
            else:
                channel.close()

    def _answer(self, hello: dict[str, Any]) -> tuple[str, str]:
        number, mine = hello.get("machine"), _same_everywhere(self._config)
        wrong = [f"{key}={hello.get(key)}, there {value}" for key, value in mine.items() if hello.get(key) != value]
        last = self._config.launch.num_machines - 1
        if wrong:
            return "refused", f"machine 0 on {host()} was started otherwise: here {'; '.join(wrong)}"
        if not isinstance(number, int) or not 1 <= number <= last:
            return "refused", f"launch.machine_rank={number}, but the other machines are numbered from 1 to {last}"
        if self._has_met:
            return "busy", f"machine 0 on {host()} is in the middle of a run"
        if number in self._others:
            return "refused", (
                f"launch.machine_rank={number} is taken by host {self._hosts[number]}. "
                "Every machine needs its own launch.machine_rank, from 0"
            )
        return "welcome", ""

    def grace_s(self) -> float | None:
        is_stop_asked = self._requests.is_stop_asked  # before listening: srun signals the others once an agent has gone
        self._listen_to_all()
        if is_stop_asked and not any(ended.is_lost for ended in self._ended.values()):
            self._write_stop()
        self._is_killing |= self._requests.is_kill_asked
        failed = any(ended.code or ended.is_lost for ended in self._ended.values())
        if self._is_killing or failed:
            self._abort()
        return 0.0 if self._is_killing else ABORT_S if failed else None

    def _abort(self) -> None:
        if not self._is_aborting:
            self._tell("kill" if self._is_killing else "abort")
        self._is_aborting = True

    def _listen_to_all(self) -> None:
        self._answer_strangers()
        for number, channel in self._others.items():
            for message in channel.receive():
                if message["kind"] == "stop":
                    self._write_stop()
                elif message["kind"] == "kill":
                    self._requests.is_stop_asked = self._requests.is_kill_asked = self._is_killing = True
                elif message["kind"] == "ended" and number not in self._ended:
                    self._ended[number] = _ended_from(message)
            if channel.is_lost and number not in self._ended:
                self._ended[number] = Ended(number, self._hosts[number], EXIT_FAILED, is_lost=True)

    def end(self, mine: Ended, judge: Callable[[Sequence[Ended]], Verdict]) -> Verdict:
        self._ended[0] = mine
        deadline: float | None = None
        while len(self._ended) < self._config.launch.num_machines:
            if self.grace_s() is not None:
                deadline = deadline or time.monotonic() + _ENDED_S
            if deadline is not None and time.monotonic() > deadline:
                for number in set(self._others) - set(self._ended):
                    self._ended[number] = Ended(number, self._hosts[number], EXIT_FAILED, is_lost=True)
            time.sleep(_POLL_S)
        verdict = judge([self._ended[number] for number in sorted(self._ended)])
        self._tell("verdict", **dataclasses.asdict(verdict))
        return verdict

    def _tell(self, kind: str, **fields: Any) -> None:
        for channel in self._others.values():
            channel.send(kind, **fields)

    def close(self) -> None:
        for channel in self._others.values():
            channel.close(_CLOSE_S)
        for stranger, _ in self._strangers:
            stranger.close()
        self._listener.close()


class OtherMachine(OneMachine):
    """machine_rank 1 and above: does what the first one says."""

    def __init__(
        self, config: RunConfig, requests: Requests, is_finished: Callable[[], Verdict | None]
    ) -> None:  # fmt: skip
        super().__init__(requests, lambda: None)
        self._config, self._is_finished = config, is_finished
        self._channel: Channel | None = None
        self._unread: list[dict[str, Any]] = []
        self._has_started = self._has_told_stop = self._has_told_kill = False
        self._first_host = ""

    @property
    def _where(self) -> str:
        launch = self._config.launch
        name = f" on {self._first_host}" if self._first_host else ""
        return f"machine 0{name} (launch.main_process_ip={launch.main_process_ip} port {launch.main_process_port})"

    def start(self, plan: Callable[[], Start | Verdict]) -> Start | Verdict:
        wait = _Wait(self._config.launch.hang_timeout_s)
        while True:
            if self._channel is None:
                finished = self._connect(wait)
                if finished is not None:
                    return finished
            for message in self._receive("start", "verdict"):
                self._has_started, self._has_told_stop = True, False
                return (Start if message.pop("kind") == "start" else Verdict)(**message)
            if self._requests.is_stop_asked:
                self._tell_stop()
                raise _stopped_before_start()
            if self._channel is not None and self._channel.is_lost:
                if self._has_started:
                    raise self._gone()
                self._channel.close()
                self._channel = None
            wait.tick(f"{self._where} waits for others" if self._channel else f"waiting for {self._where}")
            time.sleep(_POLL_S)

    def _connect(self, wait: _Wait) -> Verdict | None:
        """Tries until the first machine says welcome, or a verdict is known without it.

        Raises:
            UserError: it refuses this machine. MachinesError: it did not come, or somebody asked to stop.
        """
        launch = self._config.launch
        assert launch.main_process_port is not None
        while True:
            if (finished := self._is_finished()) is not None:
                return finished
            try:
                connection = socket.create_connection((launch.main_process_ip, launch.main_process_port), timeout=5.0)
            except OSError as error:
                why = str(error)
            else:
                channel = Channel(connection)
                channel.send("hello", machine=launch.machine_rank, host=host(), **_same_everywhere(self._config))
                answer = self._await_answer(channel)
                if answer["kind"] == "welcome":
                    self._channel, self._first_host = channel, answer["host"]
                    return None
                channel.close()
                why = answer.get("text") or "something else answers there"
                if answer["kind"] == "refused":
                    raise UserError(why)
            if self._requests.is_stop_asked:
                raise _stopped_before_start()
            wait.tick(f"waiting for {self._where}: {why}")
            time.sleep(1.0)

    def _await_answer(self, channel: Channel) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not channel.is_lost and not self._requests.is_stop_asked:
            first, *self._unread = channel.receive() or [{}]
            if first:
                return first
            time.sleep(0.02)
        return {"kind": "none"}

    def _receive(self, *kinds: str) -> list[dict[str, Any]]:
        """Messages of these kinds; others are kept for later."""
        if self._channel is None:
            return []
        messages = self._unread + self._channel.receive()
        self._unread = [message for message in messages if message["kind"] not in kinds]
        return [message for message in messages if message["kind"] in kinds]

    def _tell_stop(self) -> None:
        if self._channel is not None and not self._has_told_stop:
            self._channel.send("stop")
            self._has_told_stop = True

    def grace_s(self) -> float | None:
        assert self._channel is not None
        if self._requests.is_stop_asked:
            self._tell_stop()
        if self._requests.is_kill_asked and not self._has_told_kill:
            self._channel.send("kill")
            self._has_told_kill = True
        kinds = {message["kind"] for message in self._receive("abort", "kill")}
        if "kill" in kinds or self._has_told_kill:
            return 0.0
        return ABORT_S if kinds or self._channel.is_lost else None

    def end(self, mine: Ended, judge: Callable[[Sequence[Ended]], Verdict]) -> Verdict:
        assert self._channel is not None
        self._channel.send("ended", **_ended_as_message(mine))
        while True:
            for message in self._receive("verdict"):
                del message["kind"]
                self._unread.clear()  # an abort that came too late
                return Verdict(**message)
            if self._channel.is_lost:
                raise self._gone()
            self.grace_s()
            time.sleep(_POLL_S)

    def _gone(self) -> MachinesError:
        return MachinesError(
            f"the agent of {self._where} has gone: it was killed, or the network is down. Start the run again on every "
            "machine: it goes on from the last checkpoint"
        )

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close(_CLOSE_S)


class _Wait:
    """Says after some seconds whom one waits for, and gives up in the end."""

    def __init__(self, limit_s: float) -> None:
        now = time.monotonic()
        self._limit_s, self._deadline, self._say_at = limit_s, now + limit_s, now + _SAY_S

    def tick(self, text: str) -> None:
        """Raises: MachinesError: the time is over."""
        now = time.monotonic()
        if now > self._deadline:
            raise MachinesError(f"gave up after launch.hang_timeout_s={self._limit_s:g}: {text}")
        if now > self._say_at:
            self._say_at = now + _SAY_AGAIN_S
            print(f"launcher: {text}", file=sys.stderr, flush=True)


def _listen(config: RunConfig) -> socket.socket:
    """At main_process_ip alone where that is an address of this machine: nobody else's business.

    Raises:
        UserError: the port is taken, also after some seconds.
    """
    launch = config.launch
    port, deadline = launch.main_process_port, time.monotonic() + _BIND_S
    assert port is not None and launch.main_process_ip is not None
    while True:
        for address in (launch.main_process_ip, ""):
            try:
                listener = socket.create_server((address, port), backlog=launch.num_machines + 8)
            except OSError as error:
                failed = error
                continue
            listener.setblocking(False)
            return listener
        if time.monotonic() > deadline:
            raise UserError(
                f"launch.main_process_port={port} cannot be used on {host()}: {failed.strerror}. "
                "Choose another one, the same on every machine: launch.main_process_port=…"
            )
        time.sleep(0.5)


def _same_everywhere(config: RunConfig) -> dict[str, Any]:
    """What must not differ between the machines for their agents to work together."""
    return {
        "version": __version__,
        "run_name": config.run_name,
        "launch.num_machines": config.launch.num_machines,
        "launch.num_processes": num_processes(config),
    }


def _stopped_before_start() -> LauncherError:
    return StoppedEarlyError("stopped before the start; nothing was running")


def _ended_as_message(ended: Ended) -> dict[str, Any]:
    """Ages instead of times: the machines' clocks may differ."""
    fields, now = dataclasses.asdict(ended), time.time()
    fields["reports"] = [{**report, "time": now - report["time"]} for report in fields["reports"]]
    return fields


def _ended_from(message: dict[str, Any]) -> Ended:
    now = time.time()
    fields = {key: value for key, value in message.items() if key != "kind"}
    fields["reports"] = [{**report, "time": now - report["time"]} for report in fields["reports"]]
    for by_rank in ("killed", "hung"):  # JSON has text keys
        fields[by_rank] = {int(rank): value for rank, value in fields[by_rank].items()}
    return Ended(**fields)


def join(
    config: RunConfig, requests: Requests, write_stop: Callable[[], None], is_finished: Callable[[], Verdict | None]
) -> OneMachine:
    """This machine's part, as launch.machine_rank says."""
    if config.launch.num_machines == 1:
        return OneMachine(requests, write_stop)
    if config.launch.machine_rank == 0:
        return FirstMachine(config, requests, write_stop)
    return OtherMachine(config, requests, is_finished)
