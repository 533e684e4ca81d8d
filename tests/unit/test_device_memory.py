"""The memory that a run has is that of the devices it may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.base.device_memory import gpu_bytes

_LIST = "0, GPU-aa11, 24564\n1, GPU-bb22, 81559\n2, GPU-bb33, 143771\n10, GPU-cc44, 15360\n11, GPU-dd55, [N/A]\n"


@pytest.mark.parametrize(
    ("visible", "num_mib"),
    [
        ("1", 81559), ("2, 1", 81559), ("10", 15360), ("GPU-aa11", 24564), ("GPU-bb33,1", 81559), ("GPU-c", 15360),
        ("2,-1,10", 143771), ("MIG-aa11", 15360), ("7", 15360), ("11", 15360), ("", None),
    ],
)  # fmt: skip
def test_gpus_that_are_not_visible_do_not_count(
    visible: str, num_mib: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=index,uuid,memory.total ] && printf '%s' '{_LIST}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_bytes() == (None if num_mib is None else num_mib * 2**20)
