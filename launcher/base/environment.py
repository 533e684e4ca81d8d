"""Inherited environment variables that would change a run: its processes or its gradients. Standard library only.

Accelerate takes much of its configuration from variables, which a cluster's image, an earlier shell or an outer
launcher may have left behind: ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 divides every gradient by four, a pod's
WORLD_SIZE=8 makes one process wait for seven others.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

_LAUNCH = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE",
)  # fmt: skip
_LAUNCH_PREFIXES = ("TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "PMIX_", "MV2_COMM_", "MPI_LOCAL")
_TRAINING = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_SPLIT_BATCHES", "ACCELERATE_DYNAMO_BACKEND",
)  # fmt: skip
_PYTHON = ("PYTHONOPTIMIZE",)
"""Without docstrings transformers does not import."""
_OTHER_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
_ENGINE_PREFIXES = ("FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_", "ACCELERATE_FP8_")
AGENT_MARK = "TORCHELASTIC_RUN_ID"
"""What torchrun, and so `accelerate launch` with several processes, gives every rank."""


def without_inherited(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for an `accelerate launch` of our own: all it needs is in its flags."""
    return {
        name: value for name, value in env.items()
        if name not in _LAUNCH + _PYTHON and not name.startswith((*_LAUNCH_PREFIXES, "ACCELERATE_", *_ENGINE_PREFIXES))
    }  # fmt: skip


def clean_rank(env: MutableMapping[str, str]) -> list[str]:
    """Takes out of a rank's environment what would change its gradients, and what describes processes that no agent
    started; before the libraries are imported.

    Returns:
        Notices about what somebody may have meant.
    """
    notices = []
    for name in _TRAINING:
        value = env.pop(name, None)
        if value is not None and value.lower() not in ("", "1", "no", "false", "0"):
            notices.append(f"{name}={value} is not used: this run's settings decide that (train.*, model.dtype)")
    if AGENT_MARK not in env:
        found = [name for name in _LAUNCH if name in env]
        for name in found:
            del env[name]
        if found:
            notices.append(f"{', '.join(found)} are not used: no agent started several processes here")
    return notices


def changing_variables(env: Mapping[str, str]) -> list[str]:
    """Those set here that `without_inherited` or `clean_rank` would take out, but for what Slurm gives each task."""
    kept = without_inherited(env)
    return sorted(name for name in env if name not in kept and not (name.startswith("PMI") and "SLURM_JOB_ID" in env))


def other_engines(env: Mapping[str, str]) -> list[str]:
    """Variables by which Accelerate would train with another engine than `strategy` names."""
    return [name for name in _OTHER_ENGINES if env.get(name, "").lower() in ("1", "true", "yes", "on")]


def drop_engine_settings(env: MutableMapping[str, str]) -> None:
    """Takes out what such engines would read."""
    for name in [name for name in env if name.startswith(_ENGINE_PREFIXES)]:
        del env[name]


def interface_problems(env: Mapping[str, str]) -> list[str]:
    """Network interfaces that gloo is told to use and that this machine does not have: gloo would end, or wait, later.

    Elsewhere than for NCCL, GLOO_SOCKET_IFNAME holds whole names, separated by commas.
    """
    given = env.get("GLOO_SOCKET_IFNAME", "")
    known = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in given.split(",") if name and name not in known]
    if not unknown:
        return []
    return [
        f"GLOO_SOCKET_IFNAME={given}: host {socket.gethostname()} has no network interface {', '.join(unknown)}, "
        f"it has {', '.join(known)}. Name the one that leads to the other machines "
        "(launch.env.GLOO_SOCKET_IFNAME=NAME), or unset it"
    ]
