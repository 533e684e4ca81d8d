"""What only several machines can find out together: one shared output_dir, clocks that agree, the same versions.

Started on every machine, under srun or by hand with launch.machine_rank. They meet over TCP like the agents of a run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.agent.channel import Channel
from launcher.base.errors import LauncherError
from launcher.base.process import host
from launcher.base.shared_folder import check_shared
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.config.settings import RunConfig

_MEET_S = 60.0
_ANSWER_S = 40.0
_SKEW_S = 2.0
_FIRST_PORT, _NUM_PORTS = 20000, 12000


def machines(config: RunConfig) -> Iterator[Finding]:
    total = config.launch.num_machines
    if total == 1 or os.environ.get("SLURM_LOCALID", "0") != "0":  # one task of each node speaks for it
        return
    rank, address = _place(config)
    if address is None:
        yield Finding("machines", WARNING, f"launch.num_machines={total}, but this is one of them alone: folders "
                      "and clocks were not compared", "srun --ntasks-per-node=1 launcher doctor …, or on each: "
                      "launch.machine_rank=N launch.main_process_ip=… launch.main_process_port=…")  # fmt: skip
        return
    try:
        group = Meeting(rank, total, address)
    except OSError as error:
        yield Finding("machines", ERROR, f"machine {rank} ({host()}) did not meet the others at {address[0]} port "
                      f"{address[1]}: {error}", "open that port between the machines, or set "
                      "launch.main_process_ip and main_process_port")  # fmt: skip
        return
    with contextlib.closing(group):
        yield from _compare(group, Path(config.output_dir).expanduser().absolute())


def _place(config: RunConfig) -> tuple[int, tuple[str, int] | None]:
    """This machine's number, and where the first one listens; None where nobody has said."""
    launch, job = config.launch, os.environ.get("SLURM_JOB_ID")
    if launch.main_process_ip and launch.main_process_port:
        return launch.machine_rank, (launch.main_process_ip, launch.main_process_port)
    if job is None or "SLURM_STEP_NODELIST" not in os.environ:
        return 0, None
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    return int(os.environ["SLURM_NODEID"]), (answer.stdout.split()[0], _FIRST_PORT + int(job) % _NUM_PORTS)


def _compare(group: Meeting, folder: Path) -> Iterator[Finding]:
    there = group.gather((host(), __version__, group.skew_s))
    names = ", ".join(f"{number} {name}" for number, (name, _, _) in enumerate(there))
    versions = sorted({version for _, version, _ in there})
    if len(versions) > 1:
        yield Finding("machines", ERROR, f"different versions of this tool: {', '.join(versions)} ({names})",
                      "use one environment on a file system that all machines share")  # fmt: skip
    else:
        yield Finding("machines", OK, f"{len(there)} of {len(there)} have met: {names}")
    number, skew_s = max(((n, skew) for n, (_, _, skew) in enumerate(there)), key=lambda pair: abs(pair[1]))
    if abs(skew_s) > _SKEW_S:
        yield Finding("clocks", WARNING, f"machine {number}'s clock is {skew_s:+.1f} s from the first one's: ends of "
                      "jobs and times in logs are off by as much", "timedatectl set-ntp true")  # fmt: skip
    else:
        yield Finding("clocks", OK, f"at most {abs(skew_s):.2f} s apart")
    is_new = any(group.gather(not folder.exists()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_shared(folder, group)
    except LauncherError as error:
        yield Finding("shared folder", ERROR, str(error), "output_dir=/SHARED/…")
    else:
        yield Finding("shared folder", OK, f"{folder} is one folder for all machines")
    group.gather(None)  # all have read it
    if is_new:
        with contextlib.suppress(OSError):
            folder.rmdir()


class Meeting:
    """The doctors of all machines, as `launcher.base.shared_folder.Group`. Collective calls, in the same order."""

    is_local_main = True

    def __init__(self, rank: int, world_size: int, address: tuple[str, int]) -> None:
        """Waits up to a minute for all machines.

        Raises:
            OSError: they did not meet.
        """
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self.skew_s = 0.0
        """This machine's clock less the first one's, to some hundredths."""
        self._unread: dict[Channel, list[dict[str, Any]]] = {}
        self._channels = self._listen(address[1]) if self.is_main else {0: self._connect(address)}
        self._measure_skew()

    def _listen(self, port: int) -> dict[int, Channel]:
        channels: dict[int, Channel] = {}
        with socket.create_server(("", port)) as server:
            deadline = time.monotonic() + _MEET_S
            while len(channels) < self.world_size - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    channel = Channel(server.accept()[0])
                    number = self._hear(channel)["rank"]
                except TimeoutError:
                    missing = [str(n) for n in range(1, self.world_size) if n not in channels]
                    raise OSError(f"machine {' and '.join(missing)} did not come within {_MEET_S:.0f} s") from None
                channels[number] = channel
        return channels

    def _connect(self, address: tuple[str, int]) -> Channel:
        deadline = time.monotonic() + _MEET_S
        while True:
            try:
                channel = Channel(socket.create_connection(address, timeout=5.0))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        channel.send("value", rank=self.rank)
        return channel

    def _hear(self, channel: Channel) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            unread = self._unread.setdefault(channel, [])
            unread += channel.receive()
            if unread:
                return unread.pop(0)
            if channel.is_lost:
                raise OSError("a machine ended early")
            time.sleep(0.002)
        raise OSError("a machine does not answer")

    def _measure_skew(self) -> None:
        """Each machine in turn: half of the way there and back is taken off (Cristian's algorithm)."""
        if self.is_main:
            for channel in self._channels.values():
                self._hear(channel)
                channel.send("value", now=time.time())
            return
        asked_at = time.time()
        self._channels[0].send("value")
        theirs = float(self._hear(self._channels[0])["now"])
        self.skew_s = (asked_at + time.time()) / 2 - theirs

    def broadcast(self, value: Any) -> Any:
        if not self.is_main:
            return self._hear(self._channels[0])["value"]
        for channel in self._channels.values():
            channel.send("value", value=value)
        return value

    def gather(self, value: Any) -> list[Any]:
        if not self.is_main:
            self._channels[0].send("value", value=value)
            return list(self.broadcast(None))
        values = {0: value, **{number: self._hear(channel)["value"] for number, channel in self._channels.items()}}
        return list(self.broadcast([values[number] for number in sorted(values)]))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close(drain_s=1.0)
