"""A machine of several that is not the first."""

from __future__ import annotations

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
from launcher.base.errors import MachinesError, UserError
from launcher.base.process import host
from launcher.config.settings import RunConfig

_STOP_S = 45.0
"""So long the first machine may take to answer, once its ranks and ours were asked to stop and ours have ended."""


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
        wait = Wait(self._config.launch.hang_timeout_s)
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
                raise stopped_before_start()
            if self._channel is not None and self._channel.is_lost:
                if self._has_started:
                    raise self._gone()
                self._channel.close()
                self._channel = None
            wait.tick(f"{self._where} waits for others" if self._channel else f"waiting for {self._where}")
            time.sleep(POLL_S)

    def _connect(self, wait: Wait) -> Verdict | None:
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
                channel.send("hello", machine=launch.machine_rank, host=host(), **same_everywhere(self._config))
                answer = self._await_answer(channel)
                if answer["kind"] == "welcome" and isinstance(answer.get("host"), str):
                    channel.trust()
                    self._channel, self._first_host = channel, answer["host"]
                    return None
                channel.close()
                why = answer.get("text") or "something else answers there"
                if answer["kind"] == "refused":
                    raise UserError(why)
            if self._requests.is_stop_asked:
                raise stopped_before_start()
            wait.tick(f"waiting for {self._where}: {why}")
            time.sleep(1.0)

    def _await_answer(self, channel: Channel) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
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
        deadline, wait = float("inf"), Wait(float("inf"), END_SAY_S)
        while True:
            for message in self._receive("verdict"):
                del message["kind"]
                self._unread.clear()  # an abort that came too late
                return Verdict(**message)
            if self._requests.is_stop_asked:
                deadline = min(deadline, time.monotonic() + _STOP_S)
            if self._channel.is_lost or time.monotonic() > deadline:
                raise self._gone()
            self.grace_s()
            wait.tick(
                f"the processes here have ended; waiting for {self._where}: its processes still run (uploads, for "
                "example), or its agent does not answer"
            )
            time.sleep(POLL_S)

    def _gone(self) -> MachinesError:
        return MachinesError(
            f"the agent of {self._where} has gone: it was killed, or the network is down. Start the run again on every "
            "machine: it goes on from the last checkpoint"
        )

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close(CLOSE_S)


def _ended_as_message(ended: Ended) -> dict[str, Any]:
    """Ages instead of times: the machines' clocks may differ."""
    fields, now = dataclasses.asdict(ended), time.time()
    fields["reports"] = [{**report, "time": now - report["time"]} for report in fields["reports"]]
    return fields
