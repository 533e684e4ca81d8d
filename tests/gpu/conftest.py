"""Tests on a real CUDA device. Without one they are skipped; `benchmarks/gpu/run.sh` runs them where there is one.

Run alone, with the device visible: `CUDA_VISIBLE_DEVICES=0 pytest tests/gpu` (elsewhere the tests hide devices).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.zygote import Zygote
from tests.gpu.start import Runs, has_cuda, zygote

_LONG = ("test_resume.py", "test_out_of_memory.py")
"""They start first: several workers share the tests, and what is short fits in anywhere."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent and item.path.name not in _LONG)
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = None
    if own and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        reason = "no CUDA device is visible (CUDA_VISIBLE_DEVICES is empty)"
    elif own and not has_cuda():
        reason = "this machine has no CUDA device"
    for item in own:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.filterwarnings("default"))  # what libraries warn of on a device is no error
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes each result into $OUT at once: what is cut off by time has still told what it found."""
    if not os.environ.get("OUT") or "PYTEST_XDIST_WORKER" in os.environ or not (report.when == "call" or report.failed):
        return
    with (Path(os.environ["OUT"]) / "tests.txt").open("a") as file:
        file.write(f"{report.outcome} {report.duration:.1f} s {report.nodeid}\n")
        if report.failed:
            file.write(f"{report.longreprtext[-6000:]}\n")


@pytest.fixture(scope="session")
def gpu_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield made
    made.close()


@pytest.fixture
def runs(gpu_zygote: Zygote, tmp_path: Path) -> Runs:
    return Runs(gpu_zygote, tmp_path)
