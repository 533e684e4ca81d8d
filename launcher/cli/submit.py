"""`launcher submit`: the run as a Slurm job. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.paths import RunPaths
from launcher.cli.arguments import parse_settings
from launcher.config.arguments import Arguments
from launcher.config.compose import compose, compose_arguments
from launcher.config.rules import notices, resource_notices
from launcher.config.settings import RunConfig

_EPILOG = """examples:
  launcher submit experiment=arithmetic output_dir=/shared/demo launch.gpus_per_node=8 launch.sbatch.partition=gpu
  launcher submit --dry-run launch.num_machines=2 launch.gpus_per_node=8 launch.sbatch.time="'12:00:00'"
  launcher submit -m optim.learning_rate=1e-5,3e-5 seed=1,2 output_dir=/shared/sweep sweep.num_slots=4

Every #SBATCH option has its own name: launch.sbatch.account=…, launch.sbatch.qos=…, launch.sbatch.constraint=…
The job keeps itself going: before its time limit, when preempted and on `scancel -s TERM` it saves and requeues."""


def main(argv: Sequence[str]) -> int:
    """Submits a run or a sweep, or prints the script; returns the exit code.

    Raises:
        LauncherError: nothing was submitted.
    """
    options, arguments = _parse(argv)
    if options.multirun:
        return _sweep(arguments, is_dry_run=options.dry_run)
    from launcher.agent.supervise import check_unchanged, is_finished  # not for --help and completion
    from launcher.slurm import render_run, submit_run

    config = _compose_for_slurm(arguments)
    for notice in [*notices(config), *resource_notices(config)]:
        print(f"launcher: {notice}", file=sys.stderr)
    if options.dry_run:
        print(render_run(config), end="")
        return EXIT_DONE
    paths = RunPaths(Path(config.output_dir).expanduser().resolve())
    if is_finished(config, paths):
        check_unchanged(config, paths)
        print(f"{paths.root} is finished: nothing to do. Its model is in that folder")
        return EXIT_DONE
    submission = submit_run(config)
    for notice in submission.notices:
        print(f"launcher: {notice}", file=sys.stderr)
    print(f"submitted job {submission.job_id}\nlog: {submission.log}\nscript: {submission.script}")
    print(f"how it stands: launcher status {paths.root}")
    return EXIT_DONE


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    parser = argparse.ArgumentParser(
        prog="launcher submit", usage="launcher submit [-m] [--dry-run] [--config-dir DIR] [OVERRIDE…]",
        description="Submit a run to Slurm: it continues until it is finished. OVERRIDE as for launcher train.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: one array of jobs")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    return parse_settings(parser, argv)


def _compose_for_slurm(arguments: Arguments) -> RunConfig:
    """`launch=slurm` goes without saying, unless the overrides or an experiment choose one of their own for Slurm."""
    if arguments.config_file is not None:
        return compose_arguments([*arguments.overrides, "--config-file", arguments.config_file])
    config = compose(arguments.overrides, arguments.config_dir)
    if config.launch.name == "slurm":
        return config
    return compose((*arguments.overrides, "launch=slurm"), arguments.config_dir)


def _sweep(arguments: Arguments, *, is_dry_run: bool) -> int:
    if arguments.config_file is not None:
        raise UserError("--config-file is one run: a sweep (-m) takes overrides")
    from launcher import sweep

    overrides = (*arguments.overrides, "hydra/launcher=slurm")
    return sweep.main(overrides, arguments.config_dir, is_dry_run=is_dry_run)
