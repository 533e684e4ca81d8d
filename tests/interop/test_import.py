"""What an import takes from a folder of the Trainer, and what it refuses."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.base import manifest
from launcher.base.errors import DamagedCheckpointError, LauncherError, ResumeError, ResumeMismatchError
from launcher.base.files import read_json
from launcher.base.paths import RunPaths
from launcher.saving.interop.importing import import_checkpoint, import_notices
from launcher.saving.interop.pickles import _STAGES, load_pickle
from launcher.saving.interop.zero_shards import shards_dir
from tests.interop.folders import STEP, config_of, write_trainer_folder, write_zero2_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / f"theirs/checkpoint-{STEP}"
    write_trainer_folder(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    (tmp_path / "ours").mkdir()
    return RunPaths(tmp_path / "ours")


def do_import(source: Path, run: RunPaths, *more: str) -> Path:
    return import_checkpoint(source, config_of(run.root, *more), run)


class Malicious:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_every_tensor_stands_under_its_name(source: Path, run: RunPaths) -> None:
    folder = do_import(source, run)
    assert folder == run.checkpoint_dir(STEP) and manifest.verify(folder) == []
    weights, states = load_file(folder / "model.safetensors"), load_file(folder / "state/optimizer.safetensors")
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    names = [n for n in weights if "norm" not in n]
    assert {k: v for k, v in weights.items()}.keys() == load_file(source / "model.safetensors").keys()
    embeddings = saved["state"][0]
    assert torch.equal(states["exp_avg.model.embed_tokens.weight"], embeddings["exp_avg"])
    last_norm = saved["param_groups"][1]["params"][-1]
    assert torch.equal(states["exp_avg_sq.model.norm.weight"], saved["state"][last_norm]["exp_avg_sq"])
    assert len(states) == 2 * len(weights) and names
    state = read_json(folder / "state/state.json")
    assert [g["scalars"] for g in state["optimizer"]["groups"]] == [{"step": 1.0}] * 2
    assert state["progress"]["step"] == STEP and state["progress"]["epoch"] == 0.5 and state["total_steps"] == 20
    assert not [p.name for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".py")]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "pytorch_model.bin"])
def test_nothing_is_executed_when_a_pickle_is_malicious(source: Path, run: RunPaths, tmp_path: Path, name: str) -> None:
    """Contract: foreign pickles are read with an allow list, or refused by name."""
    marker = tmp_path / "executed"
    if name.endswith(".bin"):
        (source / "model.safetensors").unlink()
    torch.save({"state": {}, "param_groups": [], "evil": Malicious(marker)}, source / name)
    with pytest.raises(ResumeError, match=f"{name} is refused, nothing in it was executed: it names posix.system"):
        do_import(source, run)
    assert not marker.exists()
    assert list(run.checkpoint_dirs()) == [] and list(run.root.iterdir()) == []


def test_nothing_is_executed_when_a_shard_is_malicious(source: Path, run: RunPaths, tmp_path: Path) -> None:
    marker, shards = tmp_path / "executed", source / f"global_step{STEP}"
    shards.mkdir()
    torch.save(Malicious(marker), shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ResumeError, match=r"optim_states.pt is refused, nothing in it was executed"):
        do_import(source, run)
    assert not marker.exists()


def test_every_tensor_is_put_together_from_its_shards(tmp_path: Path, run: RunPaths) -> None:
    source = tmp_path / f"zero/checkpoint-{STEP}"
    params = write_zero2_folder(source)
    folder = do_import(source, run)
    weights, states = load_file(folder / "model.safetensors"), load_file(folder / "state/optimizer.safetensors")
    assert weights.keys() == params.keys() and len(states) == 2 * len(params)
    for name, param in params.items():
        assert torch.equal(weights[name], param)
        assert torch.equal(states[f"exp_avg.{name}"], 2 * param)
        assert torch.equal(states[f"exp_avg_sq.{name}"], 3 * param)
    found = manifest.read(folder)
    assert (found.world_size, found.zero_stage) == (2, 2)


def test_refused_when_the_masters_are_not_those_of_the_model(tmp_path: Path, run: RunPaths) -> None:
    """A layout that was misread would otherwise train on with shuffled weights."""
    source = tmp_path / f"zero/checkpoint-{STEP}"
    write_zero2_folder(source)
    path = source / f"global_step{STEP}/mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=True)
    saved["param_shapes"] = [dict(reversed(group.items())) for group in saved["param_shapes"]]
    torch.save(saved, path)
    with pytest.raises(ResumeError, match=r"master weights of .* are not those of the model"):
        do_import(source, run)


def test_named_when_a_shard_is_missing(tmp_path: Path, run: RunPaths) -> None:
    source = tmp_path / f"zero/checkpoint-{STEP}"
    write_zero2_folder(source)
    (source / f"global_step{STEP}/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="written by 2 processes, but the shards of 1"):
        do_import(source, run)


def test_training_arguments_are_never_read(source: Path, run: RunPaths, tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "executed"), source / "training_args.bin")
    torch.save(Malicious(tmp_path / "executed"), source / "rng_state.pth")
    assert manifest.verify(do_import(source, run)) == []
    assert not (tmp_path / "executed").exists()


def test_weights_equal_when_they_are_pickled(source: Path, run: RunPaths) -> None:
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    found = load_file(do_import(source, run) / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)


def test_a_tied_weight_is_found_under_its_other_name(source: Path, run: RunPaths) -> None:
    weights = load_file(source / "model.safetensors")
    embeddings = weights.pop("model.embed_tokens.weight")
    save_file({**weights, "lm_head.weight": embeddings}, source / "model.safetensors")
    found = load_file(do_import(source, run) / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], embeddings) and "lm_head.weight" not in found


def test_the_trainers_own_folder_stays_when_it_lies_in_output_dir(run: RunPaths) -> None:
    """Contract: a checkpoint-N without our manifest is never moved, counted or deleted."""
    source = run.checkpoint_dir(STEP)
    write_trainer_folder(source)
    before = sorted(p.name for p in source.iterdir())
    folder = do_import(source, run)
    assert folder == run.root / "imported" / source.name and manifest.verify(folder) == []
    assert sorted(p.name for p in source.iterdir()) == before
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert do_import(source, run) == folder and (folder / "manifest.json").stat().st_mtime_ns == stamp, "made again"


def test_an_import_that_failed_leaves_nothing(source: Path, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.base import files

    def full(name: str, path: Path) -> None:
        if name == "fsync" and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "on_operation", full)
    with pytest.raises(LauncherError, match=r"could not be imported.*No space left"):
        do_import(source, run)
    assert list(run.root.iterdir()) == []


def test_refused_when_its_optimizer_is_another_one(source: Path, run: RunPaths) -> None:
    with pytest.raises(ResumeMismatchError, match=r"keeps exp_avg, exp_avg_sq .*torch.optim.SGD keeps"):
        do_import(source, run, "optim=sgd")


def test_refused_when_parameters_do_not_match(source: Path, run: RunPaths) -> None:
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    saved["param_groups"][0]["params"].pop()
    torch.save(saved, source / "optimizer.pt")
    with pytest.raises(ResumeError, match=r"optimizer.pt is of 7 \+ 3 parameters.*this model's 11"):
        do_import(source, run)


def test_refused_when_an_optimizer_state_has_another_shape(source: Path, run: RunPaths) -> None:
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"][:3].clone()
    torch.save(saved, source / "optimizer.pt")
    with pytest.raises(ResumeError, match="do not match this model"):
        do_import(source, run)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "optimizer.pt").unlink(), ResumeError, "no optimizer.pt .*save_only_model"),
        (lambda f: (f / "trainer_state.json").unlink(), ResumeError, "neither our manifest.json nor"),
        (lambda f: (f / "trainer_state.json").write_text("{"), DamagedCheckpointError, "not a Trainer's state"),
        (lambda f: (f / "trainer_state.json").write_text('{"global_step": 7}'), DamagedCheckpointError, "of step 7"),
        (lambda f: os.truncate(f / "optimizer.pt", 2000), DamagedCheckpointError, "optimizer.pt cannot be read"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), DamagedCheckpointError, "model.safetensors"),
        (lambda f: (f / "config.json").unlink(), ResumeError, "cannot be built from the config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ResumeError, "LoRA adapter. Set model/peft=lora"),
    ],
)
def test_named_when_the_folder_is_broken(
    source: Path, run: RunPaths, spoil: Any, error: type[Exception], message: str
) -> None:
    spoil(source)
    with pytest.raises(error, match=message):
        do_import(source, run)
    assert list(run.checkpoint_dirs()) == []


def test_settings_that_the_trainer_recorded_are_compared(source: Path, run: RunPaths) -> None:
    folder = do_import(source, run, "optim.learning_rate=0.02", "optim.kwargs={betas: [0.8, 0.9]}")
    settings = read_json(folder / "state/state.json")["settings"]
    assert settings["optim.learning_rate"] == 0.01 and settings["optim.weight_decay"] == 0.1
    assert settings["optim.kwargs"]["betas"] == [0.9, 0.999]


def test_schedule_is_compared_by_the_next_steps_rate(source: Path, run: RunPaths) -> None:
    state = read_json(do_import(source, run) / "state/state.json")
    same = import_notices(state, learning_rate=0.005, total_steps=20, epoch=0.5, accept=False)
    assert len(same) == 1 and "Not recorded there" in same[0] and "train.train_batch_size" in same[0]
    with pytest.raises(ResumeMismatchError, match=r"0.005 there and 0.004 here.*accept_changes=true"):
        import_notices(state, learning_rate=0.004, total_steps=20, epoch=0.5, accept=False)
    accepted = import_notices(state, learning_rate=0.004, total_steps=20, epoch=0.9, accept=True)
    assert "0.005 there and 0.004 here" in accepted[1] and "epoch 0.500 there and is 0.900 here" in accepted[2]
    assert import_notices({}, learning_rate=1.0, total_steps=1, epoch=0.0, accept=False) == []


def test_shards_are_those_that_latest_names(tmp_path: Path) -> None:
    for name in ("global_step5", "global_step10"):
        (tmp_path / name).mkdir()
    with pytest.raises(DamagedCheckpointError):
        shards_dir(tmp_path)
    (tmp_path / "latest").write_text("global_step10")
    assert shards_dir(tmp_path) == tmp_path / "global_step10"
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(DamagedCheckpointError):
        shards_dir(tmp_path)


def test_state_is_json_without_infinities(source: Path, run: RunPaths) -> None:
    text = (do_import(source, run) / "state/state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "trainer_state.json", "more"])
def test_links_are_refused_when_they_would_become_files_of_ours(
    source: Path, run: RunPaths, tmp_path: Path, name: str
) -> None:
    """What is imported may be pushed: nothing from outside of the folder becomes a real file of the run."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "key.txt").write_text("secret")
    target: Path = private if name == "more" else private / name
    if name != "more":
        target.write_bytes((source / name).read_bytes() if (source / name).exists() else b"secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)
    with pytest.raises(ResumeError, match=f"{name} is a link"):
        do_import(source, run)
    assert list(run.root.iterdir()) == []


def test_no_path_of_this_machine_is_kept(source: Path, run: RunPaths, tmp_path: Path) -> None:
    """Checkpoints go to the Hub."""
    path = source / "trainer_state.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "best_model_checkpoint": f"{source.parent}/checkpoint-1"})
    )
    folder = do_import(source, run)
    for name in ("trainer_state.json", "state/state.json"):
        assert str(tmp_path) not in (folder / name).read_text()
    assert read_json(folder / "trainer_state.json")["best_model_checkpoint"] == "checkpoint-1"
    assert do_import(source, run) != folder  # the name is taken now
    assert do_import(source, run).parent.name == "imported"  # and that one is known again


def _expanded(folder: Path) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][0]["exp_avg"] = torch.zeros(1).expand(64, 16)  # as large as the parameter, and 4 bytes in the file
    torch.save(saved, folder / "optimizer.pt")


def _shared(folder: Path) -> None:
    weights = torch.zeros(10_000)
    (folder / "model.safetensors").unlink()
    torch.save({f"w{i}": weights for i in range(1000)}, folder / "pytorch_model.bin")


def _sparse(folder: Path) -> None:
    saved = torch.load(folder / "scheduler.pt", weights_only=True)
    huge = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,), check_invariants=True)
    torch.save({**saved, "x": huge}, folder / "scheduler.pt")


def _deflated(folder: Path) -> None:
    with zipfile.ZipFile(folder / "scheduler.pt") as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(folder / "scheduler.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)
        new.writestr("bomb", bytes(10**8))


def _endless(folder: Path) -> None:
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_expanded, "bytes that are not in the file"), (_shared, "more bytes than are in the file"),
        (_sparse, "not dense"), (_deflated, "is compressed"), (_endless, "do not fit into"),
    ],
)  # fmt: skip
def test_refused_when_more_is_claimed_than_is_stored(source: Path, run: RunPaths, spoil: Any, message: str) -> None:
    spoil(source)
    with pytest.raises(LauncherError, match=message):
        do_import(source, run)
    assert not run.checkpoint_dir(STEP).exists() and not run.temporary_dir(STEP).exists()


class _ByName:
    """Pickled as a member of an enumeration is by Python 3.11.2, Debian 12's own."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def test_stages_are_read_as_every_python_pickles_them(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "a.pt"
    torch.save({"by value": ZeroStageEnum(2), "by name": _ByName(ZeroStageEnum, "weights")}, file)
    assert load_pickle(file) == {"by value": 2, "by name": 3}
    assert {stage.name: stage.value for stage in ZeroStageEnum} == _STAGES
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), ("", "format"), (torch.Size, "count")):
        torch.save(_ByName(owner, name), file)
        with pytest.raises(ResumeError, match="is refused, nothing in it was executed"):
            load_pickle(file)
