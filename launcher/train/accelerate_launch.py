"""`accelerate launch`, sooner: this process imports what the ranks need, and they are forks of it.

In place of `python -m accelerate.commands.launch`, with the same arguments. Without the garbage collector beside them
the imports take a fifth less.
"""

from __future__ import annotations

import argparse
import os
import sys

from launcher.base.collector import no_collections
from launcher.train import rank_setup
from launcher.train.forked_ranks import ForkedRanks


def main() -> None:
    rank_setup.quiet_libraries()
    num_local, num_threads = _flags(sys.argv[1:])
    os.environ["OMP_NUM_THREADS"] = num_threads  # of the ranks: libgomp reads it as it is loaded
    ranks = ForkedRanks()
    with no_collections():
        from accelerate.commands import launch

        ranks.import_libraries()
    ranks.fork(num_local)
    ranks.begin_in_place_of_popen(launch)
    launch.main()


def _flags(arguments: list[str]) -> tuple[int, str]:
    """How many processes this machine starts, and how many threads each of them has."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num_processes", type=int, required=True)
    parser.add_argument("--num_machines", type=int, required=True)
    parser.add_argument("--num_cpu_threads_per_process", required=True)
    given, _ = parser.parse_known_args(arguments[: arguments.index("-m")])
    return given.num_processes // given.num_machines, given.num_cpu_threads_per_process


if __name__ == "__main__":
    main()
