"""The trackers that `tracker.name` may name, and what each needs. Found without importing any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from launcher.config.schema import did_you_mean
from launcher.config.settings import RunConfig

PACKAGES = {
    "aim": (("aim",), "aim"),
    "clearml": (("clearml",), "clearml"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dvclive": (("dvclive",), "dvclive"),
    "mlflow": (("mlflow",), "mlflow"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
"""Accelerate's trackers: the modules of which one has to be there, and what pip calls it."""


def tracker_problems(config: RunConfig) -> Iterator[str]:
    """A tracker that is none, or whose package is missing: Accelerate would leave it out without a word."""
    name = config.tracker.name
    if name is None:
        return
    if name not in PACKAGES:
        hint = did_you_mean(name, PACKAGES).replace("mean ", "mean tracker=")
        yield f"tracker.name={name} is no tracker.{hint} Valid: {', '.join(PACKAGES)}; none: tracker=off"
        return
    modules, package = PACKAGES[name]
    has_own_environment = config.launch.name == "slurm" and config.launch.container is not None
    if not has_own_environment and not any(map(_is_installed, modules)):
        yield (
            f"tracker.name={name} needs a package that is not installed: pip install {package}. "
            "Without it: tracker=tensorboard, or tracker=off"
        )


def _is_installed(module: str) -> bool:
    """A folder of that name in the working directory (wandb leaves one) is no package."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
