"""What `launcher train` and `launcher submit` take alike: overrides, and where configs of one's own are."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.config.arguments import Arguments, split_arguments

_OPTION = re.compile(r"^  (?:-\w, )?(--(?!help\b)[\w-]+(?: [A-Z]+| \{[\w,]+\})?)", re.MULTILINE)
"""An option with its value, as a verb's help lists it."""


def parse_settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments]:
    """Adds the common arguments to a verb's own and parses.

    Raises:
        ConfigError: an option is none.
    """
    parser.add_argument("--config-dir", metavar="DIR", help="configs of your own; ./conf is looked into anyway")
    parser.add_argument("--config-file", metavar="FILE", help="a run's config.yaml instead of overrides")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    split_arguments(_with_values(unknown, argv), _OPTION.findall(parser.format_help()))  # refuses options that are none
    return options, Arguments(tuple(options.overrides), options.config_dir, options.config_file)


def hush_libraries() -> None:
    """Before a model is built: bitsandbytes, which peft imports, tells of kernels that nothing here needs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not os.environ.get("LAUNCHER_DEBUG"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _with_values(unknown: Sequence[str], argv: Sequence[str]) -> list[str]:
    """`--max_steps 10` as one word, so that a message can say what was meant."""
    words = []
    for word in unknown:
        after = list(argv)[list(argv).index(word) + 1 :][:1] if word in argv else []
        has_value = bool(after) and "=" not in word and "=" not in after[0] and not after[0].startswith("-")
        words.append(f"{word}={after[0]}" if word.startswith("--") and has_value else word)
    return words


def find_own_modules() -> None:
    """Modules of the user's own in the working directory are found, as they are under `accelerate launch -m`.

    A command that pip installed has the folder of its script in the path instead.
    """
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
