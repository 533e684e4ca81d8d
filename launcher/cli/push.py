"""`launcher push`: uploads what is pending, or a checkpoint, with its card. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher.base.errors import EXIT_DONE, UserError
from launcher.config.rules import REPO_ID
from launcher.hub.push import as_data, describe, plan_push, push

_EXAMPLE = """examples:
  launcher push outputs/run                                       what is pending; else the final model
  launcher push outputs/run/checkpoint-500 --repo-id ORG/NAME     this checkpoint, so that it can be resumed
  launcher push outputs/run --dry-run                             what would be sent, without any network call

The token comes from HF_TOKEN or `hf auth login`."""


def main(argv: list[str]) -> int:
    """Pushes a run, a checkpoint or an exported model; returns the exit code.

    Raises:
        UserError: there is nothing to push or nowhere to push to. HubError: it did not arrive; says the cure.
    """
    parser = argparse.ArgumentParser(
        prog="launcher push", description="Upload what is pending in a run, or a checkpoint, with its model card.",
        epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run, a checkpoint or an exported model")
    parser.add_argument("--repo-id", metavar="ORG/NAME", help="default: the run's own")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main; made where it is missing")
    parser.add_argument("--create-pr", action="store_true", default=None, help="open a pull request instead")
    parser.add_argument("--dry-run", action="store_true", help="list files and bytes, send nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: {target, bytes, files: [{path, bytes}]}")
    parser.add_argument("--follow", action="store_true", help="stay until everything arrived, however long it takes")
    options = parser.parse_args(argv)
    if options.json and not options.dry_run:
        raise UserError(
            "--json lists what would be sent: add --dry-run. What was sent is in run.json and the Hub's commits"
        )
    if options.repo_id is not None and not REPO_ID.fullmatch(options.repo_id):
        raise UserError(f"--repo-id must be ORG/NAME (got {options.repo_id!r})")
    given = {key: getattr(options, key) for key in ("repo_id", "private", "revision", "create_pr")}
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        plan = plan_push(options.path.expanduser(), overrides)
        if options.dry_run:
            lines = [json.dumps(as_data(plan), indent=1) if options.json else describe(plan)]
        else:
            lines = push(plan, follow=options.follow)
    except OSError as error:
        raise UserError(f"{options.path} cannot be pushed: {error}") from error
    for line in lines:
        print(line)
    return EXIT_DONE
