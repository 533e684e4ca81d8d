"""What every process of a run executes: compose → build → fit → exit code.

`accelerate launch -m launcher.train [OVERRIDE…]`, or with `--config-file FILE` a config that is composed already.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from launcher.base.collector import no_collections
from launcher.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launcher.config.handed_on import take_over
from launcher.train import rank_setup

if TYPE_CHECKING:
    from launcher.config.settings import RunConfig


def main() -> None:
    rank_setup.before_imports()
    try:
        with no_collections():
            config = take_over(sys.argv[1:]) or _compose()
            rank_setup.check_agent(config, sys.argv[1:])
            import transformers.modeling_utils  # noqa: F401  # takes longest of what the build imports

            from launcher.agent import out_of_memory
            from launcher.base.processes import Processes
            from launcher.train import sizing
            from launcher.train.accelerator import build_accelerator
            from launcher.train.build import build_run, open_output_dir, tell
            from launcher.train.early_stop import EarlyStop
            from launcher.train.finish import finish, interrupted
            from launcher.train.loop import fit

            asked = out_of_memory.asked_for(config, int(os.environ.get("WORLD_SIZE", 1)))
            config, notices = sizing.settle(config)
            accelerator = build_accelerator(config)
            processes = Processes()
        sizing.check_agreement(config, processes)
        paths, lock = open_output_dir(config, processes)
        early = EarlyStop(paths, processes, lock)
        rank_setup.opened(paths, lock, processes, early)
        for notice in notices:
            tell(processes, notice)
        run = build_run(config, accelerator, processes, paths, lock, early, asked)
        rank_setup.training_began(run.recorder, run.state)
        code = EXIT_DONE
        reason = fit(run)
        if reason is None:
            finish(run, paths)
        elif interrupted(run, reason) != EXIT_STOPPED:
            code = EXIT_FAILED
        run.close()
        lock.release()
        rank_setup.maybe_report(paths, processes)
        if code:
            processes.barrier()  # an agent ends the others once one has failed
    except BaseException as error:
        rank_setup.fail(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the process group's and CUDA's destructors can hang; everything of ours is closed


def _compose() -> RunConfig:
    from launcher.config.compose import compose_arguments

    return compose_arguments(sys.argv[1:])


if __name__ == "__main__":
    main()
