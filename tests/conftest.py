"""What all tests share: an environment without anything of the user's, and DeepSpeed's operators built once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

_STARTS_RANKS = {"distributed", "faults", "sweep", "slurm", "hub", "interop"}
"""Folders of tests that start training processes."""

_VERSIONS = f"torch-{version('torch')}-deepspeed-{version('deepspeed')}"
_EXTENSIONS_DIR = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions" / _VERSIONS)
"""A folder that is given may hold what was built already: benchmarks/gpu/run.sh builds beside the first tests."""


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "LAUNCHER_", "PET_", "TORCHELASTIC_")) or name in ("HF_TOKEN", "RANK"):
            del os.environ[name]
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # no token and no cached model of the user's
    config.add_cleanup(lambda: shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, runs would rightly ignore it
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # runs of two processes, also on a machine with one GPU
    os.environ["TORCH_EXTENSIONS_DIR"] = str(_EXTENSIONS_DIR)
    # DeepSpeed calls ninja by name, also where pytest was started without activating the environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


_FIRST = ("slurm", "faults", "distributed", "hub", "interop", "sweep")
"""Folders whose files take long: with several workers they start before the others."""


class _ByFile(LoadFileScheduling):
    """A file of tests belongs to one worker, as its fixtures do; Slurm's files share a cluster, the GPU's nothing."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/gpu/"):
            return nodeid
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    config.option.loadscopereorder = False
    return _ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        own = {folder: number for number, folder in enumerate(_FIRST)}
        items.sort(key=lambda item: own.get(item.path.relative_to(Path(__file__).parent).parts[0], len(own)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its fixtures: what a test draws does not depend on the tests that ran before it in its worker."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _built_operators(request: pytest.FixtureRequest) -> None:
    """DeepSpeed compiles its shared-memory collectives at the first start, for half a minute; not in a test's time."""
    folders = {part for item in request.session.items for part in item.path.parts}
    if not folders & _STARTS_RANKS or next(_EXTENSIONS_DIR.glob("*/deepspeed_shm_comm.so"), None) is not None:
        return
    _EXTENSIONS_DIR.mkdir(parents=True, exist_ok=True)
    build = "from launcher.base._deepspeed import build_cpu_collectives; build_cpu_collectives()"
    subprocess.run([sys.executable, "-c", build], check=True, timeout=600, stdout=subprocess.DEVNULL)
