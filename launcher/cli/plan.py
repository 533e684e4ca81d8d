"""`launcher plan`: memory per device and disk per checkpoint for a config, before anything is loaded."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence

from launcher.agent.command import num_processes
from launcher.base.collector import no_collections
from launcher.base.device_memory import parse_bytes
from launcher.base.errors import EXIT_DONE, ConfigError, UserError
from launcher.cli.arguments import find_own_modules, hush_libraries, parse_settings
from launcher.cli.train import as_argv
from launcher.config.arguments import Arguments
from launcher.config.compose import compose_arguments
from launcher.config.settings import RunConfig

_EPILOG = """examples:
  launcher plan model.model_name_or_path=Qwen/Qwen2.5-0.5B model.dtype=bfloat16 data.max_length=4096
  launcher plan model.model_name_or_path=FOLDER launch.num_processes=8 --device-memory 80GB
  launcher plan experiment=openr1_distill --json

Takes the same overrides as `launcher train`. FOLDER needs a config.json and nothing else; no weights are
read, no GPU is needed. Without --device-memory it looks at the visible GPUs, else at this host's memory."""


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        ConfigError: the overrides are wrong. UserError: an option is, or the model's config cannot be read.
    """
    options, arguments = _parse(argv)
    given = parse_bytes(options.device_memory, "--device-memory") if options.device_memory else None
    rates = {
        key: float(parse_bytes(getattr(options, key), f"--{key.replace('_', '-')}"))
        for key in ("disk_bytes_per_s", "upload_bytes_per_s")
    }
    config, has_data = _composed(arguments)
    count = options.num_processes or num_processes(config)
    hush_libraries()
    find_own_modules()
    with contextlib.redirect_stdout(sys.stderr), no_collections():  # what libraries print is no part of the JSON
        from launcher.saving.plan import make_plan

        plan = make_plan(
            config, num_processes=count, given_device_bytes=given, has_data=has_data, mtbf_s=options.mtbf_s,
            tokens_per_s=options.tokens_per_s, **rates,
        )  # fmt: skip
    if options.json:
        print(json.dumps(plan))
        return EXIT_DONE
    from launcher.cli.plan_text import show

    show(config, plan)
    return EXIT_DONE


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    parser = argparse.ArgumentParser(
        prog="launcher plan", usage="launcher plan [--json] [--device-memory BYTES] [OVERRIDE…]",
        description="Memory per device, what fits, and disk per checkpoint, before anything is loaded.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--device-memory", metavar="BYTES", help="of one GPU that need not be here: 80GB")
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="default: launch.num_processes, visible GPUs, or 1"
    )
    parser.add_argument("--disk-bytes-per-s", default="1GB", metavar="BYTES", help="of one write (default 1GB)")
    parser.add_argument("--upload-bytes-per-s", default="50MB", metavar="BYTES", help="to the Hub (default 50MB)")
    parser.add_argument("--mtbf-s", type=float, metavar="SECONDS", help="between failures; default checkpoint.mtbf_s")
    parser.add_argument("--tokens-per-s", type=float, metavar="N", help="over all processes, for the time it takes")
    options, arguments = parse_settings(parser, argv)
    for name in ("num_processes", "mtbf_s", "tokens_per_s"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite (got {value:g})")
    return options, arguments


def _composed(arguments: Arguments) -> tuple[RunConfig, bool]:
    """The config, and whether it names data: a plan needs none."""
    try:
        return compose_arguments(as_argv(arguments)), True
    except ConfigError as error:
        if arguments.config_file or not all(problem.startswith("no training data") for problem in error.problems):
            raise
    return compose_arguments(as_argv(_with_demo_data(arguments))), False


def _with_demo_data(arguments: Arguments) -> Arguments:
    return Arguments((*arguments.overrides, "data=arithmetic"), arguments.config_dir, arguments.config_file)
