"""The machine that the others come to."""

from __future__ import annotations

import time

import pytest

from launcher.agent.command import free_port
from launcher.agent.first_machine import FirstMachine
from launcher.agent.requests import Requests
from launcher.base.errors import MachinesError
from launcher.config.settings import LaunchConfig, RunConfig


def test_it_takes_no_processor_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchConfig(
        num_machines=2, main_process_ip="127.0.0.1", main_process_port=free_port(), hang_timeout_s=0.8
    )
    machine = FirstMachine(RunConfig(launch=launch), Requests(), lambda: None)
    before = time.thread_time()
    with pytest.raises(MachinesError):
        machine._meet()
    spent = time.thread_time() - before
    machine.close()
    assert spent < 0.3
