"""What `launcher export` writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from launcher.base import files, manifest
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths
from launcher.cli import main
from launcher.saving.interop.importing import import_checkpoint
from launcher.saving.interop.skeleton import trainer_groups
from launcher.saving.interop.target import new_folder
from tests.distributed.zygote import ROOT, environment
from tests.interop.folders import config_of, llama, write_our_folder, write_trainer_folder


def export(*arguments: Any) -> int:
    return main(["export", *map(str, arguments)])


def masters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
        ("float32", "bfloat16"),
        ("bfloat16", None),
        ("float32", "float32"),
    ],
)
def test_from_pretrained_reads_the_export(tmp_path: Path, stored: str, wanted: str | None) -> None:
    """Another dtype than the stored one comes from the fp32 masters, not from rounded weights."""
    model = llama()
    write_our_folder(tmp_path / "checkpoint-10", model, getattr(torch, stored))
    target = tmp_path / "deep" / "served"
    more = ["--dtype", wanted] if wanted else []
    assert export(tmp_path / "checkpoint-10", target, "--format", "safetensors", "--max-shard-size", "3KB", *more) == 0
    dtype = getattr(torch, wanted or stored)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert (
        len(shards) > 1
        and index["metadata"]["total_size"] == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    )
    loaded = LlamaForCausalLM.from_pretrained(target)
    assert loaded.dtype == dtype
    for name, param in loaded.named_parameters():
        assert torch.equal(param, masters(model)[name].to(dtype)), name
    assert sorted(p.name for p in target.iterdir()) == sorted(
        {*shards, "config.json", "tokenizer_config.json", "model.safetensors.index.json"}
    )


def test_shards_stay_below_the_size(tmp_path: Path) -> None:
    write_our_folder(tmp_path / "checkpoint-10", llama(), torch.float32)
    assert (
        export(tmp_path / "checkpoint-10", tmp_path / "out", "--format", "safetensors", "--max-shard-size", "5KB") == 0
    )
    sizes = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            sizes[path.name] = [stored.get_tensor(name).nbytes for name in stored.keys()]  # noqa: SIM118
    assert all(sum(found) <= 5000 or len(found) == 1 for found in sizes.values())


def test_a_run_means_its_best_checkpoint_and_for_the_trainer_its_newest(tmp_path: Path, capsys: Any) -> None:
    for step in (5, 10):
        write_our_folder(tmp_path / f"run/checkpoint-{step}", llama(), torch.float32, step=step, best=5)
    assert export(tmp_path / "run", tmp_path / "a", "--format", "safetensors") == 0
    assert "checkpoint-5" in capsys.readouterr().out
    assert export(tmp_path / "run/checkpoint-10", tmp_path / "b", "--format", "safetensors") == 0
    assert "checkpoint-10" in capsys.readouterr().out


def test_a_run_without_checkpoints_means_its_final_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    llama().save_pretrained(run)
    (run / "run.json").write_text("{}")
    assert export(run, tmp_path / "out", "--format", "safetensors", "--dtype", "bfloat16") == 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not (tmp_path / "out/run.json").exists()
    assert export(run, tmp_path / "out2", "--format", "trainer") == 2


@pytest.mark.parametrize("format_", ["safetensors", "trainer"])
def test_refused_when_the_target_is_not_empty(tmp_path: Path, capsys: Any, format_: str) -> None:
    write_trainer_folder(tmp_path / "theirs/checkpoint-10")
    checkpoint = import_checkpoint(
        tmp_path / "theirs/checkpoint-10", config_of(tmp_path / "run"), RunPaths(tmp_path / "run")
    )
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert export(checkpoint, target, "--format", format_) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    assert export(checkpoint, target, "--format", format_) == 0
    assert (target / "model.safetensors").is_file()


def test_refused_when_the_checkpoint_is_damaged(tmp_path: Path, capsys: Any) -> None:
    write_our_folder(tmp_path / "checkpoint-10", llama(), torch.float32)
    with (tmp_path / "checkpoint-10/model.safetensors").open("r+b") as file:
        file.seek(3000)
        file.write(b"\xff\xff")
    assert export(tmp_path / "checkpoint-10", tmp_path / "out", "--format", "safetensors") == 1
    assert "model.safetensors does not match its hash" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--format", "safetensors"], "nowhere is no folder"),
        (["empty", "out", "--format", "safetensors"], "no manifest.json"),
        (["empty", "out", "--format", "safetensors", "--max-shard-size", "many"], "--max-shard-size many is no size"),
    ],
)
def test_said_when_the_arguments_are_wrong(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert export(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("operation", ["write", "fsync", "fsync_dir", "rename"])
def test_nothing_is_left_when_an_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    write_our_folder(tmp_path / "checkpoint-10", llama(), torch.float32)

    def fail(name: str, path: Path) -> None:
        if name == operation:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "on_operation", fail)
    assert export(tmp_path / "checkpoint-10", tmp_path / "out", "--format", "safetensors") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


def test_the_trainers_files_are_restored_exactly(tmp_path: Path) -> None:
    """From the Trainer to us and back: what a torch optimizer and scheduler load is what was saved."""
    source = tmp_path / "theirs/checkpoint-10"
    model = write_trainer_folder(source)
    checkpoint = import_checkpoint(source, config_of(tmp_path / "run"), RunPaths(tmp_path / "run"))
    target = tmp_path / "back"
    assert export(checkpoint, target, "--format", "trainer") == 0
    first, second = (torch.load(d / "optimizer.pt", weights_only=True) for d in (source, target))
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert state.keys() == second["state"][key].keys()
        assert all(torch.equal(state[slot], second["state"][key][slot]) for slot in state), key
    params = masters(model)
    optimizer = torch.optim.AdamW([{"params": [params[n] for n in group]} for group in trainer_groups(model)], lr=1.0)
    optimizer.load_state_dict(second)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    schedule.load_state_dict(torch.load(target / "scheduler.pt", weights_only=True))
    assert schedule.last_epoch == 1 and [g["lr"] for g in optimizer.param_groups] == [0.005, 0.005]
    control = json.loads((target / "trainer_state.json").read_text())["stateful_callbacks"]["TrainerControl"]
    assert set(control) == {"args", "attributes"}
    a, b = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_help_shows_an_example_without_torch() -> None:
    code = "import sys; from launcher.cli import main\n"
    code += "try: main(['export', '--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "launcher export outputs/run served --format safetensors --dtype bfloat16" in done.stdout


_MEASURE = """
import json, resource, sys
from pathlib import Path
import launcher.saving.interop.serving as serving
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
serving.export_safetensors(Path(sys.argv[1]), Path(sys.argv[2]), dtype="bfloat16", max_shard_bytes=int(sys.argv[3]))
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_peak_memory_is_below_two_shards(tmp_path: Path) -> None:
    """A model of 800 MB in fp32, written in bf16 in shards of 100 MB."""
    shard = 100_000_000
    model = nn.Module()
    model.config = LlamaForCausalLM.config_class(num_hidden_layers=1)
    for i in range(20):
        model.register_parameter(f"w{i}", nn.Parameter(torch.full((10_000_000,), float(i))))
    write_our_folder(tmp_path / "checkpoint-10", model, torch.float32)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "checkpoint-10"), str(tmp_path / "out"), str(shard)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert int(done.stdout) < 2 * shard
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4


def test_an_optimizer_that_only_the_checkpoint_names_is_not_imported(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    write_trainer_folder(tmp_path / "theirs/checkpoint-10")
    paths = RunPaths(tmp_path / "run")
    folder = import_checkpoint(tmp_path / "theirs/checkpoint-10", config_of(paths.root), paths)
    (tmp_path / "planted_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    state = json.loads((folder / "state/state.json").read_text())
    state["optimizer"]["name"] = "planted_module.Optimizer"
    (folder / "state/state.json").write_text(json.dumps(state))
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=10, world_size=1, zero_stage=0).to_json())
    assert export(folder, tmp_path / "out", "--format", "trainer") != 0
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_export_is_refused_when_the_folder_lies_inside_of_a_checkpoint(tmp_path: Path) -> None:
    """It would add files to it that its manifest does not name."""
    checkpoint = tmp_path / "run/checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / manifest.NAME).write_text("{}")
    for target in (checkpoint / "served", checkpoint / "deep/served"):
        with pytest.raises(UserError, match="inside of the checkpoint"), new_folder(target):
            pass
    assert [path.name for path in checkpoint.iterdir()] == [manifest.NAME]
