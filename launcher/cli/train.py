"""`launcher train`: composes the settings, then `accelerate launch` does the work. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from launcher.agent.head_start import head_start
from launcher.base.devices import device_problems, precision_problems, spare_device_problems
from launcher.base.errors import EXIT_DONE, ConfigError, UserError
from launcher.base.forks import Fork
from launcher.base.output import survive_closed_output
from launcher.cli.arguments import parse_settings
from launcher.config.arguments import Arguments
from launcher.config.handed_on import hand_on
from launcher.config.rules import cache_problems, notices
from launcher.config.settings import RunConfig, to_dict

_EPILOG = """examples:
  launcher train                                      the demo: a tiny model learns arithmetic
  launcher train data.train_files=chat.jsonl model.model_name_or_path=Qwen/Qwen2.5-0.5B
  launcher train experiment=openr1_distill launch.num_processes=8
  launcher train -m optim.learning_rate=1e-5,3e-5 seed=1,2 output_dir=outputs/sweep
  launcher train --cfg job strategy=zero3             print the settings, run nothing

Run it again and it goes on: where output_dir holds a checkpoint it continues, where the run is finished it says so.
Exit codes: 0 done, 2 the input is wrong, 1 it failed, 75 it was stopped on request and saved."""


def main(argv: Sequence[str]) -> int:
    """Runs, continues, or sweeps; returns the exit code.

    Raises:
        LauncherError: the input is wrong, or the run failed.
    """
    options, arguments = _parse(argv)
    if not options.cfg:
        survive_closed_output()
    if options.multirun:
        return _sweep(arguments)
    if options.cfg:
        print_config(_composed(arguments))
        return EXIT_DONE
    begun = head_start()
    try:
        return _train(arguments, begun)
    finally:
        if begun is not None:
            begun.end()


def _train(arguments: Arguments, begun: Fork | None) -> int:
    config = _composed(arguments)
    _check_machines(config)
    from launcher.agent.command import num_processes

    num_local = num_processes(config) // config.launch.num_machines
    problems = [
        *cache_problems(config), *device_problems(num_local, config.launch.num_machines),
        *precision_problems(config.model.dtype),
    ]  # fmt: skip
    if config.eval.in_background and config.launch.machine_rank == 0:
        problems += spare_device_problems(config.eval.background_device, num_local)
    if problems:
        raise ConfigError(problems)
    for notice in notices(config):
        print(f"launcher: {notice}", file=sys.stderr)
    from launcher.agent import supervise as agent

    hand_on(config, as_argv(arguments))
    return agent.run(config, as_argv(arguments), begun)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    parser = argparse.ArgumentParser(
        prog="launcher train", usage="launcher train [-m] [--cfg job] [--config-dir DIR] [OVERRIDE…]",
        description="Train, or go on where the run was stopped. OVERRIDE is KEY=VALUE or GROUP=CHOICE.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: every combination of the values given")
    parser.add_argument("--cfg", choices=("job",), help="print the composed settings and run nothing")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: implied, settings are printed resolved")
    return parse_settings(parser, argv)


def _composed(arguments: Arguments) -> RunConfig:
    from launcher.config.compose import compose_arguments  # imports Hydra: beside the head start

    return compose_arguments(as_argv(arguments))


def as_argv(arguments: Arguments) -> list[str]:
    """The arguments of launcher.train."""
    options = [("--config-dir", arguments.config_dir), ("--config-file", arguments.config_file)]
    return [*arguments.overrides, *(text for name, value in options if value for text in (name, value))]


def print_config(config: RunConfig) -> None:
    """The settings as YAML on stdout; they can be used again with --config-file."""
    import yaml

    print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), end="")


def _sweep(arguments: Arguments) -> int:
    if "LOCAL_RANK" in os.environ:
        raise UserError("-m starts an accelerate launch of its own for every job. Type it without: launcher train -m …")
    if arguments.config_file is not None:
        raise UserError("--config-file is one run: a sweep (-m) takes overrides")
    from launcher import sweep

    return sweep.main(arguments.overrides, arguments.config_dir)


def _check_machines(config: RunConfig) -> None:
    """Several machines without Slurm have to be told where the first one is.

    Raises:
        ConfigError: they were not.
    """
    missing = [key for key in ("main_process_ip", "main_process_port") if getattr(config.launch, key) is None]
    if config.launch.num_machines > 1 and missing:
        keys = " and ".join(f"launch.{key}" for key in missing)
        raise ConfigError(
            [
                f"launch.num_machines={config.launch.num_machines} without {keys}: launcher train runs on one machine. "
                "Set them alike on every machine, each with its own launch.machine_rank, or use launcher submit"
            ]
        )
    if config.launch.name == "slurm":
        print("launcher: launch=slurm runs here; `launcher submit` with the same arguments submits it", file=sys.stderr)
