"""Sweeps: many runs from one command, driven outside the agent."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str], config_dir: str | None = None) -> int:
    """`launcher train -m ARGUMENTS`: runs the jobs that are not finished and returns the exit code.

    Raises:
        UserError: nothing was started.
    """
    from launcher.sweep.run import run_sweep  # Hydra is only imported where a sweep runs

    return run_sweep(arguments, config_dir)
