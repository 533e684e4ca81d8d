"""Small fake runs for the Hub tests: checkpoints with a true manifest, a config, metrics."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launcher.base import manifest
from launcher.base.paths import RunPaths
from launcher.config.settings import RunConfig, to_dict
from launcher.hub.client import build_settings
from launcher.hub.environment import uploader_environment
from launcher.hub.spool import Spool
from tests.hub.server import WRITE_TOKEN

REPO = "org/model"
FAST = {"backoff_base_s": 0.05, "backoff_max_s": 0.3, "timeout_s": 5.0}


def safetensors_bytes(seed: int, num_bytes: int) -> bytes:
    """A true safetensors file with one random tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(num_bytes)


def write_model(folder: Path, seed: int, num_bytes: int = 20_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(seed, num_bytes))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')


def make_checkpoint(run: Path, step: int, num_bytes: int = 20_000, best: int | None = None) -> Path:
    folder = run / f"checkpoint-{step}"
    write_model(folder, step, num_bytes)
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.safetensors").write_bytes(safetensors_bytes(step + 10**6, num_bytes))
    (folder / "state" / "state.json").write_text(json.dumps({"step": step}))
    state = {"global_step": step, "best_model_checkpoint": f"{run}/checkpoint-{best}" if best else None}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    made = manifest.build(folder, step=step, world_size=1, zero_stage=0)
    (folder / manifest.NAME).write_bytes(made.to_json())
    return folder


def make_config(run: Path, **hub: Any) -> RunConfig:
    run.mkdir(parents=True, exist_ok=True)
    config = RunConfig(output_dir=str(run), run_name="test run")
    config.model.model_name_or_path = "org/base"
    config.hub.push_to_hub = True
    config.hub.hub_model_id = REPO
    config.hub.max_wait_s = 180.0  # the uploader gets what a busy machine leaves it
    for key, value in hub.items():
        setattr(config.hub, key, value)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    lines = [{"step": s, "epoch": s / 10, "loss": 3.0 / s} for s in range(1, 30)]
    lines += [{"step": s, "epoch": s / 10, "eval_loss": 3.1 / s} for s in range(10, 30, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def prepare_spool(run: Path, config: RunConfig, **settings: Any) -> Spool:
    """A spool as `hub.start()` leaves it, with short waits."""
    spool = Spool(RunPaths(run).hub_dir)
    spool.prepare()
    values = {**asdict(build_settings(config, RunPaths(run))), **FAST, **settings}
    spool.settings_path.write_text(json.dumps(values))
    return spool


def hub_environment(url: str, home: Path, *, xet: bool, token: str | None = WRITE_TOKEN) -> dict[str, str]:
    """What a user would set; nothing of the user who runs the tests."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if xet else "1", "OMP_NUM_THREADS": "1"}
    if token:
        env["HF_TOKEN"] = token
    return env


_CRASHING = """
import os, signal, sys
from launcher.hub import spool
seen = {}
def crash(state, wanted=sys.argv[2], at=int(sys.argv[3])):
    seen[state] = seen.get(state, 0) + 1
    if state == wanted and seen[state] == at:
        os.kill(os.getpid(), signal.SIGKILL)
spool.on_state = crash
from launcher.hub import uploader
sys.exit(uploader.main([sys.argv[1]]))
"""


class UploaderUnderTest:
    """A real uploader process on a spool; ended at the end of the `with`."""

    def __init__(self, spool: Spool, env: dict[str, str], crash_at: tuple[str, int] | None = None) -> None:
        command = [sys.executable, "-m", "launcher.hub.uploader", str(spool.root)]
        if crash_at is not None:
            command = [sys.executable, "-c", _CRASHING, str(spool.root), crash_at[0], str(crash_at[1])]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = spool.read_settings()
        log = spool.log_path.open("ab")
        full = {**inherited, **env}
        full = {**uploader_environment(settings), **full} | {
            k: v for k, v in uploader_environment(settings).items() if k in ("PYTHONPATH",)
        }
        if settings.max_bytes_per_s is not None and settings.bucket is None:
            full["HF_HUB_DISABLE_XET"] = "1"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=full)
        log.close()
        self.spool = spool

    def __enter__(self) -> UploaderUnderTest:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()


def wait_until(what: Callable[[], Any], timeout_s: float = 120.0, message: str = "it did not happen") -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, message
        time.sleep(0.05)


def upload_all(spool: Spool, env: dict[str, str], timeout_s: float = 180.0) -> None:
    """Runs an uploader until the spool is empty."""
    with UploaderUnderTest(spool, env):
        try:
            wait_until(lambda: not spool.pending(), timeout_s)
        except AssertionError:
            log = spool.log_path.read_text()[-3000:]
            raise AssertionError(f"not sent: {spool.pending()}\n{spool.read_status()}\n{log}") from None
