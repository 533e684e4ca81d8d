"""Which optional packages are there, found without importing any of them."""

from __future__ import annotations

import importlib.util

from launcher.config.settings import RunConfig


def is_in_container(config: RunConfig) -> bool:
    """Whether the run will have packages of its own."""
    return config.launch.name == "slurm" and config.launch.container is not None


def is_installed(module: str) -> bool:
    """A folder of that name in the working directory (wandb leaves one) is no package."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
