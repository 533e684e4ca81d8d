"""The command of a node, and when a run is finished; nothing is started."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from launcher.agent.supervise import accelerate_command, is_finished
from launcher.base.paths import RunPaths
from launcher.config.settings import RunConfig


def test_command_gives_every_flag_when_two_nodes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = RunConfig()
    config.launch.num_processes, config.launch.num_machines = 4, 2
    command = accelerate_command(
        config, ["seed=1"], machine_rank=1, main_process_ip="10.0.0.1", main_process_port=29501
    )
    assert command[0] == sys.executable and command[-3:] == ["-m", "launcher.train", "seed=1"]
    flags = dict(itertools.pairwise(command[3:-2]))
    assert Path(flags["--config_file"]).is_file()
    wanted = {
        "--num_processes": "4", "--num_machines": "2", "--machine_rank": "1", "--main_process_ip": "10.0.0.1",
        "--main_process_port": "29501", "--rdzv_backend": "static", "--deepspeed_multinode_launcher": "standard",
        "--num_cpu_threads_per_process": "3",
    }  # fmt: skip
    assert wanted.items() <= flags.items()


@pytest.mark.parametrize(
    ("state", "asked", "finished"),
    [
        ({"state": "finished", "step": 20, "length": [20, 1.0, 32]}, 20, True),
        ({"state": "finished", "step": 20, "length": [20, 1.0, 32]}, 30, False),
        ({"state": "interrupted", "step": 20, "length": [20, 1.0, 32]}, 20, False),
        ({"state": "finished", "step": 20, "length": [-1, 1.0, 32]}, -1, True),
        ({"state": "finished", "step": 20, "length": [-1, 2.0, 32]}, -1, False),
    ],
)
def test_run_is_finished_only_when_no_more_steps_are_asked_for(
    state: dict[str, object], asked: int, finished: bool, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path)
    paths.run_state.write_text(json.dumps(state))
    config = RunConfig()
    config.train.max_steps = asked
    assert is_finished(config, paths) is finished


def test_run_is_not_finished_when_run_json_is_broken(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.run_state.write_text("{")
    assert not is_finished(RunConfig(), paths)
