"""Python, packages against what they must be and what this release was tested with, inherited variables."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from launcher.base.environment import changing_variables
from launcher.base.paths import constraints_path
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.config.settings import RunConfig

_DISTRIBUTION = "accelerate-launcher"
_DECIDING = ("torch", "accelerate", "transformers", "deepspeed", "huggingface_hub", "hydra-core", "safetensors", "peft")
"""Libraries whose version can change what is computed or written."""


def python_and_packages(config: RunConfig) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", OK, f"{version} ({sys.executable})")
    tested, missing, wrong, untested = _tested_versions(), [], [], []
    for requirement in _requirements():
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (needs {requirement.specifier})")
        pinned = tested.get(_canonical(requirement.name))
        if pinned and requirement.name in _DECIDING and found.partition("+")[0] != pinned:
            untested.append(f"{requirement.name} {found} (tested with {pinned})")
    if missing or wrong:
        names = " ".join(f"'{r}'" for r in _requirements() if any(r.name in text for text in (*missing, *wrong)))
        text = "; ".join(filter(None, [f"missing: {', '.join(missing)}" if missing else "", ", ".join(wrong)]))
        yield Finding("packages", ERROR, text, f"{sys.executable} -m pip install {names}")
    if untested:
        yield Finding("packages", WARNING, "works in principle: " + ", ".join(untested),
                      f"{sys.executable} -m pip install -c {constraints_path()} {_DISTRIBUTION}")  # fmt: skip
    if not (missing or wrong or untested):
        named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _DECIDING)
        yield Finding("packages", OK, f"as tested: {named}")


def _requirements() -> list[Requirement]:
    try:
        texts = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # used from a checkout that was not installed
        texts = list(_DECIDING)
    needed = [Requirement(text) for text in texts]
    return [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _tested_versions() -> dict[str, str]:
    lines = constraints_path().read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {_canonical(name): version for name, equals, version in pairs if equals}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(config: RunConfig) -> Iterator[Finding]:
    """Variables that would change processes or gradients. `launcher train` takes them out."""
    found = changing_variables(os.environ)
    if found:
        yield Finding(
            "environment", WARNING,
            f"{', '.join(found)}: set here; launcher train ignores them, an accelerate launch of your own may not",
            f"unset {' '.join(found)}",
        )  # fmt: skip
    else:
        yield Finding("environment", OK, "no variable is set that would change processes or gradients")
