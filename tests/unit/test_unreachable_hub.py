"""Without internet a model of the Hub is named within seconds, with what helps."""

from __future__ import annotations

import socket
import time

import pytest

from launcher.base.errors import ConfigError
from launcher.base.internet import why_unreachable
from launcher.config.settings import RunConfig
from launcher.data import build_vocabulary


def test_the_cure_is_named_when_a_tokenizer_is_not_here_and_the_hub_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config, started = RunConfig(), time.monotonic()
    config.model.model_name_or_path = "somebody/not-here"
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 cannot be reached.*launcher prefetch model\.model"):
        build_vocabulary(config)
    assert time.monotonic() - started < 30


def test_nothing_is_wrong_when_something_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert why_unreachable() is None
