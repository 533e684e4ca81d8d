"""What sbatch takes, as far as messages need it before Slurm is asked: its options, and how it writes a time."""

from __future__ import annotations

import re

from launcher.config.schema import near_miss

_LONG_NAMES = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments
constraint container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
delay-boot dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid
gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hint hold ignore-pbs input
job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus
network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe parsable partition power prefer priority
profile propagate qos quiet reboot requeue reservation resv-ports segment signal sockets-per-node spread-job
spread-segments stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task
uid usage use-min-nodes verbose version wait wait-all-nodes wckey wrap
"""
_OPTIONS = frozenset(_LONG_NAMES.split())
"""Of Slurm 22.05 to 25.05. A newer Slurm may have more: an unknown one is passed on."""
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|infinite|unlimited|-1", re.IGNORECASE)


def is_option(name: str) -> bool:
    return name.replace("_", "-") in _OPTIONS


def meant_option(name: str) -> str | None:
    """What an unknown option was probably meant to be."""
    return near_miss(name.replace("_", "-"), _OPTIONS)


def is_time(value: object) -> bool:
    """MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]], or no limit; text alone."""
    return isinstance(value, str) and _TIME.fullmatch(value) is not None


def asks_for_gpus(name: str, value: object) -> bool:
    """Whether an option asks for GPUs in a way of its own."""
    option = name.replace("_", "-")
    if option in ("gres", "tres-per-task"):
        return "gpu" in str(value)
    return option in ("gpus", "gpus-per-task", "gpus-per-socket") and value not in (None, False, 0)
