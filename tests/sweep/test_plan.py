"""Names, grids and checks of a sweep, without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base.errors import ConfigError, UserError
from launcher.config.overrides import parse_override
from launcher.sweep import main
from launcher.sweep.devices import make_slots
from launcher.sweep.jobs import MAX_NAME_BYTES, SweepTable, job_name, job_run_name
from launcher.sweep.plan import make_plan, quoted


def names(arguments: list[str], root: Path) -> list[str]:
    plan = make_plan([f"output_dir={root}", *arguments], None)
    return [job.name for job in plan.grid(SweepTable(plan.paths))]


def test_names_are_sorted_escaped_and_hashed_over_200_bytes() -> None:
    assert job_name({"seed": "1", "optim.learning_rate": "1e-05"}) == "optim.learning_rate=1e-05,seed=1"
    assert job_name({"model/peft": "lora", "a": "x/y%$\n"}) == "a=x%2Fy%25%24%0A,model%2Fpeft=lora"
    long = [job_name({"data.train_files": f"[{'ä' * 150}{i}]"}) for i in range(2)]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in long)


def test_run_names_are_valid_repository_names_and_differ() -> None:
    names = [job_run_name("run", job_name({"optim.learning_rate": "1e-05", "x": "é" * n})) for n in (1, 200, 201)]
    assert len(set(names)) == 3
    assert all(name.replace("-", "").replace("_", "").isascii() and len(name) <= 96 for name in names)


@pytest.mark.parametrize("text", ["a b", "it's", "x=1,y=[2]", "back\\slash'", 'q"uote'])
def test_any_folder_survives_hydras_grammar(text: str) -> None:
    assert parse_override(f"output_dir={quoted(text)}").value() == text


def test_every_combination_is_a_job_once(tmp_path: Path) -> None:
    assert names(["seed=2,1,2", "optim.learning_rate=1e-5,0.00001,3e-5"], tmp_path) == [
        "optim.learning_rate=1e-05,seed=2", "optim.learning_rate=3e-05,seed=2",
        "optim.learning_rate=1e-05,seed=1", "optim.learning_rate=3e-05,seed=1",
    ]  # fmt: skip
    assert names(["seed=range(3)", "checkpoint=glob(a*)"], tmp_path) == [
        f"checkpoint=all,seed={seed}" for seed in range(3)
    ]  # fmt: skip


def test_jobs_get_everything_but_the_sweeps_own_settings(tmp_path: Path) -> None:
    plan = make_plan(
        [f"output_dir={tmp_path}", "seed=1,2", "train.max_steps=3", "sweep.num_slots=2", "hydra/launcher=local"], None
    )
    job = plan.grid(SweepTable(plan.paths))[0]
    assert job.overrides == ("train.max_steps=3", "seed=1")
    assert job.arguments[-1] == f"output_dir='{tmp_path}/seed=1'"
    assert job.arguments[-2].startswith("run_name=")


def test_one_job_without_any_values(tmp_path: Path) -> None:
    assert names(["train.max_steps=3"], tmp_path) == ["train.max_steps=3"]


def test_values_of_an_experiments_sweep_are_used_unless_overridden(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "search.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n      optim.weight_decay: 0.0,0.1\n"
    )
    plan = make_plan([f"output_dir={tmp_path}", "experiment=search", "seed=7"], str(tmp_path / "conf"))
    jobs = plan.grid(SweepTable(plan.paths))
    assert [job.name for job in jobs] == ["optim.weight_decay=0.0", "optim.weight_decay=0.1"]
    assert jobs[0].arguments[:2] == ("--config-dir", str(tmp_path / "conf"))


def test_all_mistakes_are_reported_at_once_with_their_jobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan([f"output_dir={tmp_path}", "seed=1,-2", "optim.learning_rate=a,0.1"], None)
    text = str(caught.value)
    assert (
        "seed must be at least 0 (got -2). The default is seed=42 (in optim.learning_rate=a,seed=-2 and 1 more)" in text
    )
    assert "optim.learning_rate" in text and "'a'" in text
    with pytest.raises(ConfigError, match="zerro2"):
        make_plan([f"output_dir={tmp_path}", "strategy=ddp,zerro2"], None)
    with pytest.raises(ConfigError, match="learning_rat "):
        make_plan([f"output_dir={tmp_path}", "optim.learning_rat=1,2"], None)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("output_dir=a,b", "takes one value"),
        ("sweep.num_slots=1,2", "takes one value"),
        ("hydra.sweep.dir=x", "output_dir=FOLDER"),
        ("hydra/launcher=slurmy", "slurm"),
        ("optim.learning_rate=interval(0,1)", "hydra/sweeper=optuna"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(override: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=hint):
        make_plan([f"output_dir={tmp_path}", "seed=1,2", override], None)


def test_jobs_of_a_sweep_must_not_share_a_repository(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hub_model_id"):
        make_plan([f"output_dir={tmp_path}", "seed=1,2", "hub=push", "hub.hub_model_id=me/model"], None)
    make_plan([f"output_dir={tmp_path}", "seed=1,2", "hub=push", "hub.hub_model_id=me/${run_name}"], None)
    make_plan([f"output_dir={tmp_path}", "seed=1,2", "hub=push"], None)


def test_a_sweep_under_accelerate_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="launcher train -m"):
        main(["seed=1,2"])


def test_slots_hold_disjoint_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4,GPU-abc,-1,7")
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in make_slots(None, 2)] == ["0,2", "4,GPU-abc"]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in make_slots(None, None)] == ["0,2,4,GPU-abc"]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in make_slots(4, None)] == ["0", "2", "4", "GPU-abc"]
    with pytest.raises(ConfigError, match=r"launch\.num_processes=4"):
        make_slots(1, 5)


def test_slots_share_devices_when_more_are_asked_for_than_fit_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4")
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in make_slots(4, 1)] == ["0", "2", "4", "0"]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in make_slots(2, 2)] == ["0,2", "0,2"]
    assert all("shared by up to 2 jobs" in slot.devices for slot in make_slots(2, 2))


def test_slots_without_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert len(make_slots(None, 2)) == 4
    assert make_slots(2, 2)[0].env == {"OMP_NUM_THREADS": "2"}
    assert len(make_slots(None, 100)) == 1


def test_wrong_choices_and_wrong_values_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan([f"output_dir={tmp_path}", "optim.learning_rate=1e-4,bad", "strategy=single,nope"], None)
    choice, value = caught.value.problems
    assert choice.startswith("strategy=nope is not a choice")
    assert value.startswith("optim.learning_rate must be a number (got 'bad')")
    with pytest.raises(ConfigError, match="Did you mean") as caught:  # nothing follows from what it left unset
        make_plan([f"output_dir={tmp_path}", "data.train_file=x.jsonl", "seed=1,2"], None)
    assert len(caught.value.problems) == 1
