"""Tests on a real CUDA device. Without one they are skipped; `benchmarks/gpu/run.sh` runs them where there is one.

Run alone, with the device visible: `CUDA_VISIBLE_DEVICES=0 pytest tests/gpu` (elsewhere the tests hide devices).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.start import Runs, has_cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = None
    if own and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        reason = "no CUDA device is visible (CUDA_VISIBLE_DEVICES is empty)"
    elif own and not has_cuda():
        reason = "this machine has no CUDA device"
    for item in own:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)
