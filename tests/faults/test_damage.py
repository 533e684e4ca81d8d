"""Promise 3: every kind of damage of a real checkpoint is found by `launcher verify` and passed over by a resume."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError, ResumeError
from launcher.base.paths import RunPaths
from launcher.checkpoint.resume import ResumePoint, find
from launcher.cli import verify
from tests.distributed.runs import Lab, different, lines, log_text, losses, wait_until, write_rows
from tests.faults.file_layer import OneProcess


@pytest.fixture(scope="module")
def made(lab: Lab) -> RunPaths:
    """A run of two processes with checkpoints at 10 and 20."""
    return lab.run(lab.folder / "to-damage", "zero2", 2)


@pytest.fixture
def run(made: RunPaths, tmp_path: Path) -> RunPaths:
    """A copy of its checkpoints."""
    for step in (10, 20):
        shutil.copytree(made.checkpoint_dir(step), tmp_path / f"run/checkpoint-{step}")
    return RunPaths(tmp_path / "run")


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def resume(run: RunPaths, choice: str = "auto") -> tuple[ResumePoint | None, list[str]]:
    return find(choice, run, OneProcess(), lambda folder: folder)  # type: ignore[arg-type]


def check_found(run: RunPaths, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """verify names it; resume passes it over, keeps it under another name, and goes on from the one before."""
    assert verify.main([str(run.checkpoint_dir(20))]) == 1, f"verify did not find {what}"
    assert "checkpoint-20: " in capsys.readouterr().out
    assert verify.main([str(run.root)]) == 1
    assert "checkpoint-10: whole" in capsys.readouterr().out
    point, notices = resume(run)
    assert point is not None and point.step == 10, what
    assert "checkpoint-20 is damaged" in notices[0] and "checkpoint-20.damaged" in notices[0]
    assert not run.checkpoint_dir(20).exists()
    (run.root / "checkpoint-20.damaged").rename(run.checkpoint_dir(20))


def _cut_by_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


def _pickle_instead(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb()))


class _Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {os.environ['BOMB']}",)


@pytest.mark.parametrize(
    "harm", [_cut_by_one, _cut_in_half, _empty, _lengthen, _flip_a_bit, Path.unlink, _pickle_instead],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_damage_of_any_file_is_found_and_passed_over(
    run: RunPaths, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file in turn; a deleted manifest makes the folder a foreign one, which is another test."""
    monkeypatch.setenv("BOMB", str(run.root / "bomb"))
    names = [p.relative_to(run.checkpoint_dir(20)) for p in files_of(run.checkpoint_dir(20))]
    assert {"manifest.json", "model.safetensors", "state/optimizer.safetensors", "state/rng-00001.json"} <= {
        n.as_posix() for n in names
    }
    for name in names:
        if harm is Path.unlink and name.name == "manifest.json":
            continue
        path = run.checkpoint_dir(20) / name
        good = path.read_bytes()
        harm(path)
        check_found(run, capsys, f"{harm.__name__} of {name}")
        path.write_bytes(good)
    assert verify.main([str(run.root)]) == 0
    assert not (run.root / "bomb").exists()


def test_foreign_checkpoints_are_named_and_left_alone(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = run.checkpoint_dir(30)
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"from elsewhere")
    (run.checkpoint_dir(20) / "manifest.json").unlink()
    point, notices = resume(run)
    assert point is not None and point.step == 10
    assert [n.partition(" ")[0] for n in notices] == ["checkpoint-20", "checkpoint-30"]
    assert (foreign / "pytorch_model.bin").read_bytes() == b"from elsewhere"
    assert run.checkpoint_dir(20).exists()
    assert verify.main([str(run.root)]) == 0
    assert "checkpoint-30: no manifest.json of ours, not checked" in capsys.readouterr().out
    assert verify.main([str(foreign)]) == 1


def test_a_run_never_starts_silently_at_0_when_only_damaged_checkpoints_are_left(run: RunPaths) -> None:
    for step in (10, 20):
        _flip_a_bit(run.checkpoint_dir(step) / "model.safetensors")
    for _ in range(2):  # also the second time, when all are moved aside already
        with pytest.raises(DamagedCheckpointError, match="resume_from_checkpoint=never") as caught:
            resume(run)
        assert caught.value.exit_code == 1
    assert sorted(p.name for p in run.root.iterdir()) == ["checkpoint-10.damaged", "checkpoint-20.damaged"]
    assert resume(run, "never")[0] is None


def test_an_explicit_path_that_is_damaged_has_no_fallback(run: RunPaths) -> None:
    _flip_a_bit(run.checkpoint_dir(20) / "state/state.json")
    with pytest.raises(DamagedCheckpointError, match=r"state/state\.json"):
        resume(run, str(run.checkpoint_dir(20)))
    assert run.checkpoint_dir(20).exists()


def test_a_checkpoint_of_another_step_is_found(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run.checkpoint_dir(20).rename(run.checkpoint_dir(40))
    assert verify.main([str(run.checkpoint_dir(40))]) == 1
    assert "is of step 20" in capsys.readouterr().out
    point, _ = resume(run)
    assert point is not None and point.step == 10


def test_a_checkpoint_that_holds_only_the_model_is_refused(run: RunPaths) -> None:
    from launcher.base import manifest

    folder = run.checkpoint_dir(20)
    shutil.rmtree(folder / "state")
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=20, world_size=2, zero_stage=2).to_json())
    with pytest.raises(ResumeError, match="save_only_model") as caught:
        resume(run)
    assert caught.value.exit_code == 2


@pytest.mark.timeout(300)
def test_planted_pickles_never_run_and_damage_does_not_change_the_result(
    lab: Lab, made: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real resume beside pickles under every name that DeepSpeed, Accelerate or the Trainer would load."""
    bomb = tmp_path / "bomb"
    monkeypatch.setenv("BOMB", str(bomb))
    folder = tmp_path / "run"
    shutil.copytree(made.checkpoint_dir(10), folder / "checkpoint-10")
    shutil.copytree(made.checkpoint_dir(20), folder / "checkpoint-20")
    shutil.copyfile(made.metrics, folder / "metrics.jsonl")
    _flip_a_bit(folder / "checkpoint-20/model.safetensors")
    planted = [
        "pytorch_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state.pth",
        "rng_state_0.pth", "random_states_0.pkl", "scaler.pt", "training_args.bin", "latest", "custom_checkpoint_0.pkl",
        "global_step10/mp_rank_00_model_states.pt", "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "pytorch_model/mp_rank_00_model_states.pt", "state/optimizer.pt", "state/state.pkl", "state/rng-00000.pkl",
        "sampler.bin", "dl_state_dict.bin",
    ]  # fmt: skip
    for name in planted:
        path = folder / "checkpoint-10" / name
        path.parent.mkdir(exist_ok=True)
        _pickle_instead(path)
    run = lab.run(folder, "zero2", 2)
    assert not bomb.exists()
    text = log_text(folder)
    assert "continuing from" in text and "checkpoint-20 is damaged" in text
    assert "ignored, not part of the checkpoint" in text and "random_states_0.pkl" in text
    assert different(made.checkpoint_dir(20), run.checkpoint_dir(20)) == []
    assert losses(run) == losses(made)


def _foreign(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _nonsense(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def _flipped(folder: Path) -> None:
    _flip_a_bit(folder / "model.safetensors")


_HARMS = [_flipped, _foreign, _nonsense, shutil.rmtree]


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> RunPaths:
    """A run of three processes that was stopped after step 12; its best checkpoint is its first one."""
    rows = lab.folder / "eval.jsonl"
    write_rows(rows, 5)
    run = RunPaths(lab.folder / "best-to-damage")
    faults = [{"kind": "sleep", "seconds": 0.1}, {"kind": "wait", "step": 14, "file": str(run.stop_file)}]
    lab.start(run.root, "zero3", 3, *_best(lab), env={"FAULTS": json.dumps(faults)})
    wait_until(lambda: max(lines(run), default=0) >= 12, "step 12")
    run.stop_file.touch()
    assert lab.zygote.wait() == [0] * 3, log_text(run.root)
    return run


def _best(lab: Lab) -> tuple[str, ...]:
    return (
        f"data.eval_files=[{lab.folder / 'eval.jsonl'}]", "eval.eval_strategy=steps", "eval.eval_steps=5",
        "checkpoint.save_steps=5", "checkpoint.load_best_model_at_end=true", "checkpoint.greater_is_better=true",
    )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "harm", [pytest.param(h, marks=() if h is _flipped else pytest.mark.slow, id=h.__name__) for h in _HARMS]
)
def test_the_next_best_model_is_published_when_the_best_checkpoint_is_damaged(
    lab: Lab, stopped: RunPaths, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """Nobody had read it since it was saved: damaged weights became the final model, or the end failed every time."""
    run = RunPaths(shutil.copytree(stopped.root, tmp_path / "run"))
    measured = {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}
    assert measured[5] > measured[10], measured
    harm(run.checkpoint_dir(5))
    lab.run(run.root, "zero3", 3, *_best(lab))
    text = log_text(run.root)
    assert ("checkpoint-5 is damaged" in text) is (harm in (_flipped, _nonsense)), text
    assert "no saved checkpoint has a finite" not in text
    assert (run.root / "checkpoint-5").exists() is (harm is _foreign)
    measured = {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}
    best = max((10, 15, 20), key=lambda step: measured[step])
    assert files.read_json(run.run_state)["best_step"] == best
    published = (run.root / "model.safetensors").read_bytes()
    assert published == (run.checkpoint_dir(best) / "model.safetensors").read_bytes()
    assert not (run.root / "state").exists()
