"""Fixtures of the tests with transformers' own Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.zygote import Zygote
from tests.interop.bench import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("interop")
    zygote = Zygote(folder / "log")
    yield Bench(zygote, folder)
    zygote.close()
