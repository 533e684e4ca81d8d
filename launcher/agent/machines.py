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

from collections.abc import Callable

from launcher.agent.first_machine import FirstMachine
from launcher.agent.machine import OneMachine, Verdict
from launcher.agent.other_machine import OtherMachine
from launcher.agent.requests import Requests
from launcher.config.settings import RunConfig


def join(
    config: RunConfig, requests: Requests, write_stop: Callable[[], None], is_finished: Callable[[], Verdict | None]
) -> OneMachine:
    """This machine's part, as launch.machine_rank says."""
    if config.launch.num_machines == 1:
        return OneMachine(requests, write_stop)
    if config.launch.machine_rank == 0:
        return FirstMachine(config, requests, write_stop)
    return OtherMachine(config, requests, is_finished)
