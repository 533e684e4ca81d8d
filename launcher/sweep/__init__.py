"""Sweeps: many runs from one command, driven outside the agent."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str], config_dir: str | None = None, *, is_dry_run: bool = False) -> int:
    """`launcher train -m ARGUMENTS`: runs the jobs that are not finished and returns the exit code.

    Args:
        arguments: overrides, several values to a key.
        config_dir: configs of the user's own.
        is_dry_run: with hydra/launcher=slurm, print the scripts and submit nothing.

    Raises:
        UserError: nothing was started.
    """
    from launcher.sweep.run import run_sweep  # Hydra is only imported where a sweep runs

    return run_sweep(arguments, config_dir, is_dry_run=is_dry_run)
