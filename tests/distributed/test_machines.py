"""Several machines without Slurm: one `launcher train` on each, here all on one host. All end alike, whoever fails.

The agents are real, their ranks are a stand-in (stand_in/); tests/faults/test_launches.py has real ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.command import free_port
from launcher.base import files
from launcher.base.lock import RunLock
from tests.distributed.runs import wait_until
from tests.distributed.zygote import ROOT, environment

_STAND_IN = Path(__file__).with_name("stand_in")


class Machines:
    """The agents of one run, which share an output_dir."""

    def __init__(self, root: Path, plan: list[list[str]], *more: str, port: int | None = None) -> None:
        self.root, self.port, self._plan, self._more = root, port or free_port(), plan, more
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        root.mkdir(exist_ok=True)

    def start(self, *ranks: int, overrides: tuple[str, ...] = ()) -> None:
        count = len(self._plan)
        for rank in ranks or range(count):
            overrides_of_all = [
                f"output_dir={self.root}", f"launch.num_machines={count}", f"launch.num_processes={count}",
                "launch.main_process_ip=127.0.0.1", f"launch.main_process_port={self.port}", "strategy=ddp",
                f"launch.machine_rank={rank}", "train.max_steps=20", "experiment=arithmetic", "model=tiny_llama",
                *self._more, *overrides,
            ]  # fmt: skip
            with self._log(rank).open("ab") as log:
                self.agents[rank] = subprocess.Popen(
                    [sys.executable, "-m", "launcher.cli", "train", *overrides_of_all],
                    env={**environment(), "PYTHONPATH": f"{_STAND_IN}:{ROOT}", "PLAN": json.dumps(self._plan)},
                    cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip

    def _log(self, rank: int) -> Path:
        return self.root / f"agent-{rank}.out"

    def text(self, rank: int) -> str:
        return self._log(rank).read_text()

    def texts(self) -> str:
        return "\n".join(f"--- {rank}\n{self.text(rank)}" for rank in self.agents)

    def codes(self, seconds: float = 240.0) -> list[int]:
        deadline = time.monotonic() + seconds
        for agent in self.agents.values():
            try:
                agent.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running\n{self.texts()}") from None
        return [self.agents[rank].returncode for rank in sorted(self.agents)]

    def run_json(self) -> dict[str, Any]:
        value: dict[str, Any] = files.read_json_or(self.root / "run.json", {})
        return value

    def attempts(self, rank: int) -> list[str]:
        path = self.root / f"starts-{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_start(self, number: int = 1) -> None:
        def has_started() -> bool:
            done = [agent.poll() for agent in self.agents.values()]
            assert done == [None] * len(done), f"{done}\n{self.texts()}"
            return all(len(self.attempts(rank)) >= number for rank in self.agents)

        wait_until(has_started, f"start {number}", 240)

    def close(self) -> None:
        for agent in self.agents.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


@contextmanager
def machines(root: Path, plan: list[list[str]], *more: str, port: int | None = None) -> Iterator[Machines]:
    made = Machines(root, plan, *more, port=port)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("count", [2, 3])
def test_all_end_with_0_when_the_run_finishes_and_say_so_when_started_again(tmp_path: Path, count: int) -> None:
    with machines(tmp_path / "run", [["finish"]] * count) as run:
        run.start()
        assert run.codes() == [0] * count, run.texts()
        assert len({run.attempts(rank)[0] for rank in range(count)}) == 1, "one id on all machines"
        run.start()
        assert run.codes() == [0] * count, run.texts()
        assert all("is finished: nothing to do" in run.text(rank) for rank in range(count))
        assert len(run.attempts(0)) == 1


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "failing"),
    [("die", 1), ("raise", 0), pytest.param("die", 0, marks=_SLOW), pytest.param("raise", 1, marks=_SLOW)],
)
def test_all_restart_together_when_a_rank_fails_on_any_machine(tmp_path: Path, failing: int, kind: str) -> None:
    plan = [["stay", "finish"], ["stay", "finish"]]
    plan[failing][0] = f"{kind}:5"
    with machines(tmp_path / "run", plan) as run:
        run.start()
        assert run.codes() == [0, 0], run.texts()
        assert run.attempts(0) == run.attempts(1) and len(run.attempts(0)) == 2
        for rank in (0, 1):
            assert "restarting from the last checkpoint (1 of 3)" in run.text(rank)
            assert f"rank {failing}" in run.text(rank)


def test_restarts_are_counted_together_when_machines_fail_in_turn(tmp_path: Path) -> None:
    with machines(
        tmp_path / "run", [["die:5", "stay", "die:6"], ["stay", "die", "stay"]], "launch.max_restarts=2"
    ) as run:
        run.start()
        assert run.codes() == [1, 1], run.texts()
        assert len(run.attempts(0)) == len(run.attempts(1)) == 3
        state = run.run_json()
        assert (state["state"], state["reason"], state["exit_code"]) == ("failed", "crash", 1)


def test_all_end_with_2_and_do_not_restart_when_the_input_is_wrong(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["stay"], ["stay"], ["refuse"]]) as run:
        run.start()
        assert run.codes() == [2, 2, 2], run.texts()
        assert all("the input is wrong" in run.text(rank) for rank in range(3))
        state = run.run_json()
        assert (state["state"], state["reason"], state["exit_code"], state["step"]) == ("failed", None, 2, 7)


@pytest.mark.parametrize(
    ("number", "asked"),
    [
        (signal.SIGTERM, 1), (signal.SIGINT, 0),
        pytest.param(signal.SIGTERM, 0, marks=_SLOW), pytest.param(signal.SIGINT, 1, marks=_SLOW),
    ],
)  # fmt: skip
def test_all_end_with_75_when_any_agent_is_asked_to_stop(tmp_path: Path, asked: int, number: int) -> None:
    with machines(tmp_path / "run", [["stay"], ["stay"]]) as run:
        run.start()
        run.wait_for_start()
        os.kill(run.agents[asked].pid, number)
        assert run.codes() == [75, 75], run.texts()
        assert (run.run_json()["state"], run.run_json()["reason"]) == ("interrupted", "signal")


@_SLOW
def test_all_end_at_once_when_any_agent_gets_ctrl_c_twice(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["stay"], ["stay"]]) as run:
        run.start()
        run.wait_for_start()
        run.root.joinpath("STOP").mkdir()  # which the ranks cannot obey
        os.kill(run.agents[1].pid, signal.SIGINT)
        time.sleep(2.0)  # two signals that come together are one
        os.kill(run.agents[1].pid, signal.SIGINT)
        assert run.codes() == [1, 1], run.texts()
        assert "killed at once" in run.text(0) and "killed at once" in run.text(1)


@_SLOW
def test_run_goes_on_when_strangers_talk_to_the_first_machines_port(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["stay", "finish"], ["stay", "finish"]]) as run, contextlib.ExitStack() as stack:
        run.start()
        run.wait_for_start()
        odd = [b"GET / HTTP/1.0\r\n\r\n", b"[" * 60_000 + b"\n", b'{"kind":"hello"}\n', b'{"kind":"kill"}\n']
        for data in [*odd, b"\xff" * 99_999, *[b""] * 1_100]:
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", run.port), timeout=2))
                connection.sendall(data)
        time.sleep(2.0)
        run.root.joinpath("STOP").touch()
        assert run.codes() == [75, 75], run.texts()


@_SLOW
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_others_say_whom_they_wait_for_and_end_with_the_runs_code_when_an_agent_stands_still(
    tmp_path: Path, frozen: int
) -> None:
    with machines(tmp_path / "run", [["stay"]] * 3, "launch.hang_timeout_s=25") as run:
        run.start()
        run.wait_for_start()
        os.kill(run.agents[frozen].pid, signal.SIGSTOP)
        run.root.joinpath("STOP").touch()  # the ranks end; the agent of one machine does not say so
        others = [rank for rank in range(3) if rank != frozen]
        told = f"the processes here have ended; waiting for machine {frozen}"
        wait_until(lambda: all(told in run.text(rank) for rank in (others if frozen == 0 else [0])), "a word", 240)
        if frozen == 0:  # which alone may still upload: the others end on request
            for rank in others:
                os.kill(run.agents[rank].pid, signal.SIGTERM)
        assert [run.agents[rank].wait(240) for rank in others] == [75, 75], run.texts()
        os.kill(run.agents[frozen].pid, signal.SIGCONT)
        assert run.agents[frozen].wait(240) == 75, run.texts()


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_with_1_when_an_agent_is_killed(tmp_path: Path, killed: int) -> None:
    with machines(tmp_path / "run", [["stay"]] * 3) as run:
        run.start()
        run.wait_for_start()
        files = [run.root / f"pid-{rank}" for rank in range(3)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), "the pids of all ranks", 240)
        pids = [int(file.read_text()) for file in files]
        run.agents[killed].kill()
        codes = run.codes()
        assert [code for rank, code in enumerate(codes) if rank != killed] == [1, 1], run.texts()
        others = [run.text(rank) for rank in range(3) if rank != killed]
        assert all(f"machine {killed} on" in text and "has gone" in text for text in others)
        state = run.run_json()
        assert (state["state"], state["reason"], state["exit_code"]) == ("failed", "crash", 1)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of all ranks", 240)


@_SLOW
def test_it_is_said_whom_a_machine_waits_for_and_the_run_begins_when_it_comes_late(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["finish"], ["finish"], ["finish"]]) as run:
        run.start(2)
        wait_until(lambda: "waiting for machine 0" in run.text(2), "a word from machine 2", 240)
        run.start(0)
        wait_until(lambda: "waiting for machine 1 of" in run.text(0), "a word from machine 0", 240)
        run.start(1)
        assert run.codes() == [0, 0, 0], run.texts()


@pytest.mark.parametrize("started", [0, 1])
def test_a_machine_gives_up_when_another_never_comes(tmp_path: Path, started: int) -> None:
    with machines(tmp_path / "run", [["finish"], ["finish"]], "launch.hang_timeout_s=2") as run:
        run.start(started)
        assert run.codes() == [1], run.texts()
        assert f"gave up after launch.hang_timeout_s=2: waiting for machine {1 - started}" in run.text(started)


@_SLOW
def test_waiting_machines_end_with_75_when_one_is_asked_to_stop(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["finish"]] * 3) as run:
        run.start(0, 1)
        wait_until(lambda: "waits for others" in run.text(1), "both to wait", 240)
        os.kill(run.agents[1].pid, signal.SIGTERM)
        assert run.codes() == [75, 75], run.texts()


@_SLOW
def test_a_busy_port_is_named(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        machines(tmp_path / "run", [["finish"], ["finish"]], port=taken.getsockname()[1]) as run,
    ):
        run.start(0)
        assert run.codes() == [2], run.texts()
        assert f"launch.main_process_port={run.port} cannot be used" in run.text(0)


@_SLOW
def test_a_machine_is_refused_when_its_rank_is_taken_or_its_settings_differ(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["finish"]] * 3) as run:
        run.start(0, 1)
        wait_until(lambda: "waits for others" in run.text(1), "the first two", 240)
        for overrides, words in (
            (("launch.machine_rank=1",), "launch.machine_rank=1 is taken by host"),
            (("launch.num_processes=6",), "launch.num_processes=6, there 3"),
        ):
            run.start(2, overrides=overrides)
            assert run.agents[2].wait(240) == 2, run.texts()
            assert words in run.text(2)
        run.start(2)
        assert run.codes() == [0, 0, 0], run.texts()


def test_all_are_told_when_output_dir_is_in_use(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["finish"], ["finish"]]) as run:
        held = RunLock(run.root / ".lock")
        held.acquire([os.getpid()])
        run.start()
        codes = run.codes()
        held.release()
        assert codes == [2, 2], run.texts()
        assert all(f"pid {os.getpid()}" in run.text(rank) for rank in (0, 1))


def test_stop_of_an_earlier_start_is_no_request(tmp_path: Path) -> None:
    with machines(tmp_path / "run", [["finish"], ["finish"]]) as run:
        (run.root / "STOP").write_text("signal")
        run.start()
        assert run.codes() == [0, 0], run.texts()


@pytest.mark.parametrize(("action", "num_starts"), [("raise-own", 1), ("raise", 2), ("leave", 2), ("die", 4)])
def test_what_fails_the_same_way_before_any_checkpoint_is_not_restarted_for_ever(
    tmp_path: Path, action: str, num_starts: int
) -> None:
    """One machine. A killed rank may be killed by chance; an error of the user's own code comes again."""
    with machines(tmp_path / "run", [[action]], "strategy=single") as run:
        run.start()
        assert run.codes() == [1], run.texts()
        assert len(run.attempts(0)) == num_starts, run.texts()
        assert run.text(0).count("restarting from the beginning (there is no checkpoint yet)") == num_starts - 1
        if action == "raise-own":
            assert "a fault\n  at /home/me/metric.py:5 in score\n  traceback: " in run.text(0)
            assert run.run_json()["step"] == 7
