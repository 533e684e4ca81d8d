"""What is told of a rank that hung, from faulthandler's stacks; and of a network interface that is not there."""

from __future__ import annotations

import os
import socket

import pytest

from launcher.agent.attempt import where_it_stood
from launcher.agent.machine import Ended
from launcher.agent.outcome import judge
from launcher.base.environment import interface_problems
from launcher.base.paths import RunPaths

_TORCH = os.path.dirname(os.__file__) + "/site-packages/torch/distributed/distributed_c10d.py"  # noqa: PTH120
_STACKS = """Timeout (0:00:08)!
Thread 0x1 (most recent call first):
  File "/x/other.py", line 1 in elsewhere

Thread 0x2 (most recent call first):
"""
_HUNG = f'{_STACKS}  File "{os.__file__}", line 9 in sleep\n  File "/me/metric.py", line 7 in score\n'
_WAITS = f'{_STACKS}  File "{_TORCH}", line 3 in all_reduce\n  File "/me/loop.py", line 5 in agree\n'


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (_HUNG, (False, "score (/me/metric.py:7)")),
        (_WAITS, (True, "agree (/me/loop.py:5)")),
        ("", (False, "a place that it could not write down")),
    ],
)
def test_place_is_the_innermost_line_outside_of_libraries(stacks: str, expected: tuple[bool, str]) -> None:
    assert where_it_stood(stacks) == expected


def test_rank_that_hung_is_named_with_host_and_place_and_those_that_waited_are_not_blamed(
    tmp_path: os.PathLike[str],
) -> None:
    hung = {0: where_it_stood(_WAITS), 1: where_it_stood(_HUNG), 2: where_it_stood(_WAITS)}
    machines = [Ended(0, "a", 1, hung={0: hung[0]}), Ended(1, "b", 1, hung={1: hung[1], 2: hung[2]})]
    found = judge(RunPaths(tmp_path), "x", machines)  # type: ignore[arg-type]
    assert found.reason == "hang"
    assert found.text.startswith("rank 1 on b: no step for launch.hang_timeout_s; it stood in score (/me/metric.py:7)")
    assert found.text.endswith("ranks 0, 2 waited for it")


def test_all_are_named_when_all_waited(tmp_path: os.PathLike[str]) -> None:
    machines = [Ended(0, "a", 1, hung={0: where_it_stood(_WAITS), 1: where_it_stood(_WAITS)})]
    text = judge(RunPaths(tmp_path), "x", machines).text  # type: ignore[arg-type]
    assert text.count("it waited for the others in agree (/me/loop.py:5)") == 2


def test_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    (problem,) = interface_problems({"GLOO_SOCKET_IFNAME": "lo,nope0"})
    names = [name for _, name in socket.if_nameindex()]
    assert "no network interface nope0" in problem and ", ".join(names) in problem
    assert interface_problems({"GLOO_SOCKET_IFNAME": "lo"}) == interface_problems({}) == []
