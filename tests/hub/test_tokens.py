"""Promise 6: the token's text is in no file, command line, log or message, after every fault."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hub.server import HubServer

_RUN = """
import sys, time
from pathlib import Path
from launcher.hub import build_hub, spool
from launcher.base.paths import RunPaths
from tests.hub.helpers import make_checkpoint, make_config, write_model
run = Path(sys.argv[1])
hub = build_hub(make_config(run, hub_strategy="all_checkpoints"), RunPaths(run))
hub.start()
for step in (10, 20):
    hub.checkpoint_committed(step, make_checkpoint(run, step))
    time.sleep(2.0)
    print(hub.poll(), hub.status())
write_model(run, 1)
print(hub.finish(run))
print(hub.finish(None, max_wait_s=1.0), hub.status())
"""


def command_lines(token: str, found: list[str], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if token.encode() in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue


@pytest.mark.parametrize("kind", ["http", "xet", pytest.param("token file", marks=pytest.mark.slow)])
def test_token_is_nowhere_after_every_fault(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path, kind: str
) -> None:
    token, commit = "hf_" + os.urandom(17).hex(), "POST .*/commit/"
    hub.tokens[token] = "write"
    for number, fault in enumerate(
        [
            {"status": 401, "message": f"Invalid credentials Bearer {token}"},
            {"status": 403, "message": f"no rights for {token}"},
            {"status": 500, "message": token},
            {"reset": True},
            {"lose_reply": True},
        ]
    ):
        hub.fail([commit, "preupload", "repos/create", "GET .*/api/models", commit][number], **fault)
    found: list[str] = []
    stop = threading.Event()
    scanner = threading.Thread(target=command_lines, args=(token, found, stop))
    scanner.start()
    env = {**os.environ, "HF_TOKEN": token, "HF_DEBUG": "1", "HF_HUB_DISABLE_XET": "0" if kind == "xet" else "1"}
    token_file = Path(env["HF_HOME"]) / "token"
    if kind == "token file":  # as `hf auth login` leaves it, of a server that gives tokens another shape
        del env["HF_TOKEN"]
        token = f"plainword{os.urandom(9).hex()}"
        hub.tokens[token] = "write"
        hub.faults[2].message = token
        token_file.parent.mkdir(parents=True)
        token_file.write_text(token)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(tmp_path / "run")], capture_output=True, text=True, env=env, timeout=300
        )
    finally:
        stop.set()
        scanner.join()
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    assert found == []
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p != token_file]
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "run" / ".hub").iterdir())
    assert any(p.name == "journal.json" for p in files)
    assert [str(p) for p in files if token.encode() in p.read_bytes()] == []


def test_no_token_travels_with_a_pickled_setting(trainer_env: dict[str, str], tmp_path: Path) -> None:
    from launcher.base.paths import RunPaths
    from launcher.hub import build_hub
    from launcher.hub.client import SpoolHub, build_settings
    from tests.hub.helpers import make_config

    config = make_config(tmp_path)
    hub = build_hub(config, RunPaths(tmp_path))
    assert isinstance(hub, SpoolHub)
    for value in (build_settings(config, RunPaths(tmp_path)), config):
        assert trainer_env["HF_TOKEN"].encode() not in pickle.dumps(value)
