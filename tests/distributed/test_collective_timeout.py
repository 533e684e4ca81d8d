"""What processes wait on while another one tokenises, fetches or imports does not time out as torch's default would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.agent.command import free_port
from tests.distributed.zygote import environment

_SCRIPT = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
c10d.default_pg_timeout = timedelta(seconds=1)  # torch's own: half an hour
from launcher.base import processes
from launcher.config.compose import compose_arguments
if sys.argv[1] == "short":
    processes.COLLECTIVE_TIMEOUT = timedelta(seconds=1)
from launcher.train.accelerator import build_accelerator
build_accelerator(compose_arguments(["strategy=" + sys.argv[2]]))
group = processes.Processes()
group.barrier()
if group.rank == 1:
    time.sleep(4)
group.on_main(lambda: None)
group.barrier()
dist.barrier()
print("all met")
"""


def outcomes(timeout: str, strategy: str, log: Path) -> tuple[list[int], str]:
    """The exit codes and the output of two processes, of which one is late by four times the default."""
    env = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with log.open("wb") as out:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, timeout, strategy], stdout=out, stderr=out, cwd=log.parent,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            codes = [rank.wait(120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    return codes, log.read_text()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_processes_wait_for_a_late_one_longer_than_torchs_default(tmp_path: Path, strategy: str) -> None:
    codes, text = outcomes("ours", strategy, tmp_path / "log")
    assert codes == [0, 0] and text.count("all met") == 2, text


@pytest.mark.slow
def test_the_time_out_in_force_is_ours(tmp_path: Path) -> None:
    """With ours shortened the same wait ends in an error: nothing else holds the processes up."""
    codes, text = outcomes("short", "ddp", tmp_path / "log")
    assert codes[0] != 0 and "imed out" in text, text


def test_the_time_out_is_a_day() -> None:
    from launcher.base.processes import COLLECTIVE_TIMEOUT

    assert COLLECTIVE_TIMEOUT.total_seconds() == 86400
