"""Collects what a GPU machine without a network lacks: `make gpu-bundle` writes it to .gpu-bundle/.

Such a machine is taken to have torch, transformers, accelerate, huggingface_hub, peft, safetensors, pyarrow, rich and
pytest (any versions that pyproject.toml allows), and Python 3.12. The rest travels as wheels, at the versions of
constraints.txt. What is published as source only (DeepSpeed, antlr4) is built here; both are pure Python then, and
DeepSpeed builds its operators there with nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".gpu-bundle"
_MAX_BYTES = 45 * 2**20
_WHEELS = (
    "hydra-core", "omegaconf", "datasets", "dill", "multiprocess", "pydantic", "pydantic_core", "annotated_types",
    "typing_inspection", "hjson", "einops", "trl", "liger-kernel",
)  # fmt: skip
_SOURCES = ("deepspeed", "antlr4-python3-runtime==4.9.3")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pinned(name: str) -> str:
    """`name==version` where constraints.txt has one."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if re.split(r"[=<>~]", line)[0].lower().replace("_", "-") == name.lower().replace("_", "-"):
            return line
    return name


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    version = os.environ.get("BUNDLE_PYTHON", "3.12")
    target = ["--python-version", version, "--implementation", "cp", *platforms]
    for name in _WHEELS:  # one by one: --no-deps does not look whether two of them fit
        command = [*pip, "download", "--no-deps", "--only-binary=:all:", *target, "-d", str(FOLDER), pinned(name)]
        subprocess.run(command, check=True)
    # pydantic wants exactly one version of its core.
    wanted = subprocess.run(
        ["unzip", "-p", str(next(FOLDER.glob("pydantic-*.whl"))), "*/METADATA"], check=True, capture_output=True
    ).stdout.decode()
    core = re.search(r"^Requires-Dist: pydantic-core==(\S+)", wanted, re.M)
    if core and not any(core[1] in path.name for path in FOLDER.glob("pydantic_core-*")):
        for path in FOLDER.glob("pydantic_core-*"):
            path.unlink()
        name = f"pydantic_core=={core[1]}"
        subprocess.run(
            [*pip, "download", "--no-deps", "--only-binary=:all:", *target, "-d", str(FOLDER), name], check=True
        )
    for name in _SOURCES:
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(FOLDER), pinned(name)], check=True)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    if size > _MAX_BYTES:
        sys.exit(f"{FOLDER} has {size:,} bytes, more than the {_MAX_BYTES:,} that are to travel")
    print(f"{FOLDER.name}: {len(list(FOLDER.iterdir()))} wheels, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
