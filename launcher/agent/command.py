"""The `accelerate launch` command of one machine."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.agent.head_start import MODULE
from launcher.base.devices import num_cores, visible_gpus
from launcher.base.errors import UserError
from launcher.config.settings import RunConfig

_ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")
_PORTS = (20000, 32000)
"""Below those that the kernel gives to outgoing connections, which would take the port before the ranks do."""


def num_processes(config: RunConfig) -> int:
    """Over all machines."""
    if config.launch.num_processes is not None:
        return config.launch.num_processes
    if config.strategy.name == "single":
        return 1
    return max(1, len(visible_gpus())) * config.launch.num_machines


def accelerate_command(config: RunConfig, arguments: Sequence[str], port: int, log_dir: str) -> list[str]:
    """The command of this machine. Every flag is given, so that no default_config.yaml of the user's is read.

    Args:
        arguments: of launcher.train: overrides, or --config-file FILE.
        port: where the ranks meet on the first machine; another one at each start.
        log_dir: a folder that goes with this start. torchrun would make one in /tmp, and leave it there.
    """
    launch, total = config.launch, num_processes(config)
    command = [
        sys.executable, "-m", MODULE, "--config_file", str(_ACCELERATE_CONFIG),
        "--num_processes", str(total), "--num_machines", str(launch.num_machines), "--mixed_precision", "no",
        "--dynamo_backend", "no", "--log_dir", log_dir,
        "--num_cpu_threads_per_process", str(_threads(config, total // launch.num_machines)),
    ]  # fmt: skip
    if total > 1:
        command += ["--multi_gpu", "--main_process_port", str(port)]
    if launch.num_machines > 1:
        command += [
            "--machine_rank", str(launch.machine_rank), "--main_process_ip", str(launch.main_process_ip),
            "--rdzv_backend", "static", "--same_network", "--deepspeed_multinode_launcher", "standard",
        ]  # fmt: skip
    return [*command, "-m", "launcher.train", *arguments]


def _threads(config: RunConfig, local_processes: int) -> int:
    """
    Raises:
        UserError: OMP_NUM_THREADS is no number; a list's first one counts, the others are of nested regions.
    """
    given = str({**os.environ, **config.launch.env}.get("OMP_NUM_THREADS", "")).partition(",")[0].strip()
    if not given:
        return max(1, num_cores() // max(1, local_processes))
    try:
        return int(given)
    except ValueError:
        raise UserError(
            f"OMP_NUM_THREADS={given} is no number of threads: set a whole number (each process gets so many), or "
            "unset it (the cores of the machine are shared among its processes)"
        ) from None


def free_port() -> int:
    """One that nobody listens at on this machine."""
    source = random.SystemRandom()  # two starts at once must not try the same ones in the same order
    for port in [*(source.randrange(*_PORTS) for _ in range(100)), 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise AssertionError("unreachable: the kernel finds a port for 0")
