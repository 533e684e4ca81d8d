"""`launcher prefetch` really downloads, and only what a run without internet reads."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.cli import prefetch
from launcher.config.compose import compose
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
_MAKE_ADAPTER = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from launcher.data.tokenizer import byte_tokenizer
torch.manual_seed(1)
lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), lora).save_pretrained(sys.argv[2])
tokenizer = byte_tokenizer()
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
tokenizer.save_pretrained(sys.argv[2])
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
print("template", tokenizer.chat_template)
print("weights", sum(p.double().abs().sum().item() for p in model.parameters() if p.requires_grad))
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


def add_adapter(hub: HubServer, env: dict[str, str], tmp_path: Path) -> list[str]:
    """org/tiny and org/adapter on the Hub, and the folders of both; settings that train the adapter on."""
    for code, *folders in ((_MAKE_MODEL, "made"), (_MAKE_ADAPTER, "made", "adapter")):
        made = run_python(code, env, *(str(tmp_path / folder) for folder in folders))
        assert made.returncode == 0, made.stderr
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/tiny"}))
    for name, folder in (("org/tiny", "made"), ("org/adapter", "adapter")):
        hub.add_repo(name, {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(7)))
    return ["model=pretrained", "model.model_name_or_path=org/tiny", f"data.train_files=[{rows}]"]


_NAMED = {
    "typed": ("", ["model.adapter_name_or_path=ADAPTER"]),
    "typed with a choice": ("", ["model=scratch", "model.adapter_name_or_path=ADAPTER"]),
    "experiment": (
        "experiment/mine.yaml: # @package _global_\nmodel:\n  adapter_name_or_path: ADAPTER\n", ["experiment=mine"],
    ),
    "experiment with a choice": (
        "experiment/mine.yaml: # @package _global_\ndefaults:\n  - override /model: pretrained\n"
        "model:\n  adapter_name_or_path: ADAPTER\n", ["experiment=mine"],
    ),
    "choice": ("model/mine.yaml: adapter_name_or_path: ADAPTER\ndtype: float32\n", ["model=mine"]),
    "choice of an experiment": (
        "model/mine.yaml: adapter_name_or_path: ADAPTER\ndtype: float32\n"
        "experiment/mine.yaml: # @package _global_\ndefaults:\n  - override /model: mine\n", ["experiment=mine"],
    ),
}  # fmt: skip


_ALWAYS = (
    ("typed", "adapter", "org/tiny"), ("experiment", "org/adapter", "org/tiny"),
    ("choice of an experiment", "org/adapter", "odd folder, 'named'"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("named", "adapter", "base"),
    [
        pytest.param(*combined, marks=[] if combined in _ALWAYS else pytest.mark.slow)
        for combined in itertools.product(
            _NAMED, ("org/adapter", "adapter"), ("org/tiny", "folder", "odd folder, 'named'")
        )
    ],
)
def test_base_is_the_adapters_own_when_only_the_adapter_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], named: str, adapter: str, base: str,
) -> None:  # fmt: skip
    """On the command line, in an experiment or in a choice; adapter and base on the Hub or in a folder."""
    asked: list[tuple[str, str | None]] = []
    own = tmp_path / "adapter"
    own.mkdir()
    if base != "org/tiny":
        base = str(tmp_path / base)
        Path(base).mkdir()
        (Path(base) / "config.json").write_text("{}")
    settings = {"base_model_name_or_path": base, "peft_type": "LORA", "revision": "v1" if base == "org/tiny" else None}
    (own / "adapter_config.json").write_text(json.dumps(settings))

    def fetch(name: str, revision: str | None, **_: bool) -> Path:
        asked.append((name, revision))
        return own

    monkeypatch.setattr("launcher.cli.prefetch.fetch_model", fetch)
    adapter = adapter if adapter == "org/adapter" else str(own)
    texts, overrides = _NAMED[named]
    for text in re.split(r"(?m)^(?=(?:experiment|model)/)", texts):
        if text:
            path = tmp_path / "conf" / text.partition(": ")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.partition(": ")[2].replace("ADAPTER", adapter))
    config_dir = ["--config-dir", str(tmp_path / "conf")] if texts else []
    typed = [text.replace("ADAPTER", adapter) for text in overrides]
    assert prefetch.main([*config_dir, *typed, f"output_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert f"adapter {adapter} belongs to {base}; to train it on: " in said
    assert (("org/tiny", "v1") in asked) == (base == "org/tiny") == ("model org/tiny: " in said)
    assert (("org/adapter", None) in asked) == (adapter == "org/adapter")
    assert (f"model {base}: a folder; nothing to download" in said) == (base != "org/tiny")
    hint = shlex.split(said.partition("to train it on: ")[2].splitlines()[0]) if "odd" not in base else []
    assert not hint or compose([*(t for t in typed if t != "model=scratch"), *hint], config_dir[-1] if texts else None)


@pytest.mark.slow
def test_adapter_is_loaded_with_its_tokenizer_when_prefetched(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    """As the same adapter in a folder."""
    overrides = [*add_adapter(hub, env, tmp_path), f"output_dir={tmp_path / 'run'}"]
    alone = [o for o in overrides if not o.startswith("model")]  # the base is the one that the adapter names
    done = run_python(_PREFETCH, env, *alone, "model.adapter_name_or_path=org/adapter")
    assert done.returncode == 0, done.stderr
    named = (
        "adapter org/adapter belongs to org/tiny; to train it on: model=pretrained model.model_name_or_path=org/tiny"
    )
    assert named in done.stdout
    assert "adapter org/adapter: " in done.stdout and "model org/tiny: " in done.stdout
    hub.requests.clear()
    told = []
    for adapter in ("org/adapter", str(tmp_path / "adapter")):
        loaded = run_python(_LOAD, {**env, "HF_HUB_OFFLINE": "1"}, *overrides, f"model.adapter_name_or_path={adapter}")
        assert loaded.returncode == 0, loaded.stderr
        told.append(loaded.stdout.splitlines()[-3:])
    assert told[0] == told[1] and "m.content" in told[0][0]
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_run_of_two_processes_continues_an_adapter_when_it_is_on_the_hub(
    hub: HubServer, env: dict[str, str], tmp_path: Path, strategy: str
) -> None:
    """Nothing is in the cache; in bf16, where the masters are read from the adapter's own fp32 file."""
    overrides = [
        *add_adapter(hub, env, tmp_path), f"strategy={strategy}", "launch.num_processes=2", "train.max_steps=2",
        "train.train_batch_size=4", "model.dtype=bfloat16", "tracker=off", "checkpoint=last",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    env = {**env, "OMP_NUM_THREADS": "1"}
    results = []
    for name, adapter in (("hub", "org/adapter"), ("folder", str(tmp_path / "adapter"))):
        run = tmp_path / name
        code = "import sys; from launcher.cli import main; sys.exit(main(sys.argv[1:]))"
        arguments = ["train", *overrides, f"output_dir={run}", f"model.adapter_name_or_path={adapter}"]
        done = run_python(code, env, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append((run / "adapter_model.safetensors").read_bytes())
        assert "m.content" in (run / "chat_template.jinja").read_text()
    assert results[0] == results[1] != (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
