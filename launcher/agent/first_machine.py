"""The machine of several that the others connect to."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher.agent.channel import Channel
from launcher.agent.machine import (
    ABORT_S,
    ANSWER_S,
    CLOSE_S,
    END_SAY_S,
    POLL_S,
    Ended,
    OneMachine,
    Start,
    Verdict,
    Wait,
    same_everywhere,
    stopped_before_start,
)
from launcher.agent.requests import Requests
from launcher.base.errors import EXIT_FAILED, LauncherError, UserError
from launcher.base.process import host
from launcher.config.settings import RunConfig

_BIND_S = 10.0
_MAX_STRANGERS = 256
"""Connections that have not said who they are; anybody may connect."""
_ENDED_S = 60.0
"""So long an agent may take, after `abort`, to say that its ranks have ended."""


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
        wait = Wait(launch.hang_timeout_s)
        while self._missing:
            time.sleep(POLL_S)
            self._answer_strangers()
            for number, channel in list(self._others.items()):
                is_stopped = any(message["kind"] == "stop" for message in channel.receive())
                if is_stopped or self._requests.is_stop_asked:
                    raise stopped_before_start()
                if channel.is_lost:  # it may come again
                    self._drop(number)
            if self._requests.is_stop_asked:
                raise stopped_before_start()
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
                if len(self._strangers) >= _MAX_STRANGERS:
                    connection.close()
                else:
                    self._strangers.append((Channel(connection), time.monotonic() + ANSWER_S))
        for channel, deadline in list(self._strangers):
            hello = next((message for message in channel.receive() if message["kind"] == "hello"), None)
            if hello is None and not channel.is_lost and time.monotonic() < deadline:
                continue
            self._strangers.remove((channel, deadline))
            answer, text = self._answer(hello) if hello else ("refused", "")
            channel.send(answer, text=text, host=host())
            if hello and answer == "welcome":
                channel.trust()
                self._others[hello["machine"]], self._hosts[hello["machine"]] = channel, hello["host"]
            else:
                channel.close()

    def _answer(self, hello: dict[str, Any]) -> tuple[str, str]:
        number, mine = hello.get("machine"), same_everywhere(self._config)
        wrong = [f"{key}={hello.get(key)}, there {value}" for key, value in mine.items() if hello.get(key) != value]
        last = self._config.launch.num_machines - 1
        if wrong:
            return "refused", f"machine 0 on {host()} was started otherwise: here {'; '.join(wrong)}"
        if not isinstance(hello.get("host"), str) or not isinstance(number, int) or not 1 <= number <= last:
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
        limit_s = self._config.launch.hang_timeout_s
        deadline, wait = time.monotonic() + limit_s, Wait(float("inf"), END_SAY_S)
        while len(self._ended) < self._config.launch.num_machines:
            if self.grace_s() is not None or self._requests.is_stop_asked:
                deadline = min(deadline, time.monotonic() + _ENDED_S)
            missing = sorted(set(self._others) - set(self._ended))
            if time.monotonic() > deadline:
                for number in missing:
                    self._ended[number] = Ended(number, self._hosts[number], EXIT_FAILED, is_lost=True)
            names = " and ".join(f"machine {number} on {self._hosts[number]}" for number in missing)
            wait.tick(
                f"the processes here have ended; waiting for {names}: its processes still run, or its agent does not "
                f"answer. Given up after launch.hang_timeout_s={limit_s:g}, or {_ENDED_S:g} s after a request to stop"
            )
            time.sleep(POLL_S)
        verdict = judge([self._ended[number] for number in sorted(self._ended)])
        self._tell("verdict", **dataclasses.asdict(verdict))
        return verdict

    def _tell(self, kind: str, **fields: Any) -> None:
        for channel in self._others.values():
            channel.send(kind, **fields)

    def close(self) -> None:
        for channel in self._others.values():
            channel.close(CLOSE_S)
        for stranger, _ in self._strangers:
            stranger.close()
        self._listener.close()


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


def _ended_from(message: dict[str, Any]) -> Ended:
    now = time.time()
    fields = {key: value for key, value in message.items() if key != "kind"}
    fields["reports"] = [{**report, "time": now - report["time"]} for report in fields["reports"]]
    for by_rank in ("killed", "hung", "stopped"):  # JSON has text keys
        fields[by_rank] = {int(rank): value for rank, value in fields[by_rank].items()}
    return Ended(**fields)
