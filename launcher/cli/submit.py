"""`launcher submit`: the run as a Slurm job. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.compose import compose, split_arguments
from launcher.config import RunConfig
from launcher.errors import EXIT_DONE
from launcher.slurm import render_run, submit_run

_EXAMPLE = """examples:
  launcher submit experiment=arithmetic output_dir=/shared/demo launch.gpus_per_node=8 launch.sbatch.partition=gpu
  launcher submit --dry-run launch.num_machines=2 launch.gpus_per_node=8 launch.sbatch.time="'12:00:00'"
  launcher submit -m optim.learning_rate=1e-5,3e-5 seed=1,2 output_dir=/shared/sweep sweep.num_slots=4

Every #SBATCH option has its own name: launch.sbatch.account=…, launch.sbatch.qos=…, launch.sbatch.constraint=…
The job keeps itself going: it saves before its time limit, on preemption and on `scancel -s TERM`, and requeues itself."""


def main(argv: list[str]) -> int:
    """Submits a run, or prints its script; returns the exit code.

    Raises:
        LauncherError: nothing was submitted.
    """
    parser = argparse.ArgumentParser(
        prog="launcher submit", description="Submit a run to Slurm: it continues until it is finished.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: one array of jobs")
    parser.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    parser.add_argument("--config-dir", metavar="DIR", help="where else to look for configs")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="KEY=VALUE, as for launcher train")
    options, rest = parser.parse_known_args(argv)
    # An override may start with a dash or stand after an option; split_arguments names what is neither.
    arguments = split_arguments([*options.overrides, *rest])
    if options.multirun:
        from launcher.sweep.run import run_sweep

        return run_sweep([*arguments.overrides, "hydra/launcher=slurm"], options.config_dir)
    config = _compose_for_slurm(arguments.overrides, options.config_dir)
    if options.dry_run:
        print(render_run(config), end="")
        return EXIT_DONE
    submission = submit_run(config)
    print(f"submitted job {submission.job_id}\nlog: {submission.log}\nscript: {submission.script}")
    print(f"how it stands: launcher status {Path(config.output_dir).expanduser().resolve()}")
    return EXIT_DONE


def _compose_for_slurm(overrides: tuple[str, ...], config_dir: str | None) -> RunConfig:
    """`launch=slurm` goes without saying, unless the overrides or an experiment choose a launch of their own for Slurm."""
    config = compose(overrides, config_dir)
    if config.launch.name == "slurm":
        return config
    return compose((*overrides, "launch=slurm"), config_dir)
