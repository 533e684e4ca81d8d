"""`launcher prefetch` really downloads, and only what a run without internet reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from launcher.base import manifest
from launcher.hub.items import checkpoint_item
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, upload_all
from tests.hub.server import HubServer

DATA_SET = "org/questions"
_CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
_MAKE_MODEL = """
import sys
from transformers import AutoModelForCausalLM, LlamaConfig
from launcher.data.tokenizer import byte_tokenizer
config = LlamaConfig(
    vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
byte_tokenizer().save_pretrained(sys.argv[1])
"""
_PREFETCH = """
import sys
from launcher.cli import prefetch
code = prefetch.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""
_LOAD = """
import sys
from launcher.config.compose import compose_arguments
from launcher.data import build_data, build_tokenizer
from launcher.model.build import build_model
config = compose_arguments(sys.argv[1:])
tokenizer = build_tokenizer(config)
data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
model = build_model(config, tokenizer).module
print("loaded", len(data.train), sum(p.numel() for p in model.parameters()))
"""


def run_python(code: str, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **env}, timeout=180)


def requested(hub: HubServer) -> set[str]:
    """Files that were asked for since the last look, as REPO/PATH."""
    found = [re.fullmatch(r"(?:GET|HEAD) /(.+)/resolve/[^/]+/(.+)", line) for line in hub.requests]
    hub.requests.clear()
    return {f"{match[1]}/{match[2]}" for match in found if match}


def test_run_needs_no_network_when_prefetched(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    made = run_python(_MAKE_MODEL, env, str(tmp_path / "made"))
    assert made.returncode == 0, made.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    others = {"README.md": b"# Tiny", "model.onnx": b"x", "last-checkpoint/model.safetensors": b"x"}
    hub.add_repo("org/tiny", {**files, **others})
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(7))
    hub.add_repo(f"datasets/{DATA_SET}", {"README.md": _CARD.encode(), "train.jsonl": rows.encode()})
    overrides = [
        "model.model_name_or_path=org/tiny", f"data.dataset_name={DATA_SET}", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip

    done = run_python(_PREFETCH, env, *overrides)
    assert done.returncode == 0, done.stderr
    assert "model org/tiny: " in done.stdout and f"data set {DATA_SET}: train" in done.stdout
    asked = requested(hub)
    assert {path for path in asked if path.startswith("org/tiny/")} == {f"org/tiny/{name}" for name in files}
    assert f"datasets/{DATA_SET}/train.jsonl" in asked

    loaded = run_python(_LOAD, {**env, "HF_HUB_OFFLINE": "1"}, *overrides)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[-1].startswith("loaded 7 ")
    assert hub.requests == []


def test_weights_are_not_fetched_when_only_the_tokenizer_is_named(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    hub.add_repo("org/tiny", {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "model.safetensors": b"x"})
    done = run_python(_PREFETCH, env, "model.tokenizer_name_or_path=org/tiny", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert requested(hub) == {"org/tiny/tokenizer.json", "org/tiny/tokenizer_config.json"}


def test_checkpoint_is_fetched_into_the_output_dir(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    done = run_python(_PREFETCH, env, f"checkpoint.resume_from_checkpoint=hf://{REPO}", f"output_dir={fresh}")
    assert done.returncode == 0, done.stderr
    assert manifest.verify(fresh / "checkpoint-10") == []


def test_model_without_weights_is_refused(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    hub.add_repo("org/empty", {"config.json": b"{}"})
    done = run_python(_PREFETCH, env, "model.model_name_or_path=org/empty", f"output_dir={tmp_path}")
    assert "the repository has no weights at its top" in done.stderr
