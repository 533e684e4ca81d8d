"""What `launcher train` and `launcher submit` take alike: overrides, and where configs of one's own are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from launcher.config.compose import Arguments, split_arguments


def parse_settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    """Adds the common arguments to a verb's own and parses.

    Raises:
        ConfigError: an option is none.
    """
    parser.add_argument("--config-dir", metavar="DIR", help="configs of your own; ./conf is looked into anyway")
    parser.add_argument("--config-file", metavar="FILE", help="a run's config.yaml instead of overrides")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    split_arguments(unknown)  # refuses options that are none
    return options, Arguments(tuple(options.overrides), options.config_dir, options.config_file)
