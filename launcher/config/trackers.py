"""The trackers that `tracker.name` may name, and what each needs. Found without importing any of them."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.packages import is_in_container, is_installed
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
    if not is_in_container(config) and not any(map(is_installed, modules)):
        yield (
            f"tracker.name={name} needs a package that is not installed: pip install {package}. "
            "Without it: tracker=tensorboard, or tracker=off"
        )
