from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.helpers import hub_environment
from tests.hub.server import HubServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(params=["http", "xet"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """The plain LFS transport."""
    return hub_environment(hub.url, tmp_path / "home", xet=False)


@pytest.fixture
def xet_env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return hub_environment(hub.url, tmp_path / "home", xet=True)


@pytest.fixture
def env_of(hub: HubServer, tmp_path: Path, transport: str) -> dict[str, str]:
    """Both transports, one after the other."""
    return hub_environment(hub.url, tmp_path / "home", xet=transport == "xet")


@pytest.fixture
def trainer_env(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Sets it for uploaders that the code under test starts itself."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    return env
