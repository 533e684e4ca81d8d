"""Several machines without Slurm, with real ranks: agents on one host, killed in every way; promise 1."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.agent.command import free_port
from launcher.base import files
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, lines, wait_until
from tests.distributed.zygote import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_SLOW_STEPS = {"kind": "sleep", "seconds": 0.1}


class Agents:
    """What was started on each machine, and what it printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], env: dict[str, str]) -> None:
        with self.folder.joinpath(f"machine-{len(self.processes)}.out").open("ab") as out:
            self.processes.append(
                subprocess.Popen(
                    command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd="/", start_new_session=True,
                    env={**environment(), **env},
                )
            )  # fmt: skip

    def codes(self) -> list[int]:
        return [process.wait(300) for process in self.processes]

    def text(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("machine-*.out")))


@contextmanager
def started(lab: Lab, folder: Path, strategy: str, sizes: tuple[int, int], faults: list[object]) -> Iterator[Agents]:
    """`launcher train` on each of sizes[0] machines, with sizes[1] processes in all."""
    count, total = sizes
    folder.mkdir(exist_ok=True)
    agents = Agents(folder)
    common = lab.overrides(
        folder / "run", strategy, f"launch.num_machines={count}", f"launch.num_processes={total}",
        "launch.main_process_ip=127.0.0.1", f"launch.main_process_port={free_port()}", "checkpoint.save_steps=5",
    )  # fmt: skip
    try:
        for rank in range(count):
            command = [sys.executable, "-m", "launcher.cli", "train", *common, f"launch.machine_rank={rank}"]
            agents.start(command, {"FAULTS": json.dumps(faults)})
        yield agents
    finally:
        _end(agents)


def _end(agents: Agents) -> None:
    for process in agents.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("ddp", (2, 2)), ("zero2", (2, 2)), ("zero2", (2, 4)), ("ddp", (3, 3))]
)
def test_end_is_identical_when_a_rank_and_then_an_agent_of_another_machine_are_killed(
    lab: Lab, tmp_path: Path, strategy: str, sizes: tuple[int, int]
) -> None:
    with started(lab, tmp_path / "a", strategy, sizes, []) as agents:
        assert agents.codes() == [0] * sizes[0], agents.text()
    run = RunPaths(tmp_path / "b" / "run")
    kill = {"kind": "kill", "rank": sizes[1] - 1, "step": 8, "once": str(tmp_path / "once")}
    with started(lab, tmp_path / "b", strategy, sizes, [_SLOW_STEPS, kill]) as agents:
        wait_until((tmp_path / "once").exists, "the death of a rank", 200)
        before = files.read_json_or(run.run_state, {}).get("attempt")
        wait_until(lambda: files.read_json_or(run.run_state, {}).get("attempt") != before, "a restart", 200)
        wait_until(lambda: max(lines(run), default=0) >= 12, "some steps", 200)
        agents.processes[-1].kill()
        assert agents.codes()[:-1] == [1] * (sizes[0] - 1), agents.text()
        assert agents.text().count("(1 of 3)") == sizes[0], agents.text()
    with started(lab, tmp_path / "b", strategy, sizes, []) as agents:
        assert agents.codes() == [0] * sizes[0], agents.text()
    assert different(tmp_path / "a/run/checkpoint-20", run.checkpoint_dir(20)) == []


@pytest.mark.parametrize("how", ["launcher train", "accelerate launch"])
@pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")
def test_output_dir_of_which_each_machine_has_its_own_is_refused_before_the_first_step(
    lab: Lab, tmp_path: Path, how: str
) -> None:
    """The second machine is in a mount namespace of its own, with another file system in the same place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    overrides, port = lab.overrides(shared / "run", "ddp"), str(free_port())
    agents = Agents(tmp_path)
    try:
        for rank in (0, 1):
            if how == "launcher train":
                where = {"num_machines": 2, "num_processes": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1"}
                own = [f"launch.{key}={value}" for key, value in {**where, "main_process_port": port}.items()]
                command = [sys.executable, "-m", "launcher.cli", "train", *overrides, *own]
            else:
                command = [
                    sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                    str(ROOT / "launcher/agent/accelerate.yaml"), "--multi_gpu", "--num_processes=2",
                    "--num_machines=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1",
                    f"--main_process_port={port}", "--rdzv_backend=static", "--same_network", "--mixed_precision=no",
                    "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "-m", "launcher.train", *overrides,
                ]  # fmt: skip
            mount = f"mount -t tmpfs none {shlex.quote(str(shared))} && exec {shlex.join(command)}"
            agents.start(["unshare", "--mount", "bash", "-c", mount] if rank else command, {})
        codes = agents.codes()
    finally:
        _end(agents)
    assert codes == ([2, 2] if how == "launcher train" else [1, 1]), agents.text()
    for rank in (0, 1):
        assert f"rank {rank} has {shared}/run on host" in agents.text(), agents.text()
    assert not (shared / "run" / "metrics.jsonl").exists()
    assert not list((shared / "run").glob("checkpoint-*"))
