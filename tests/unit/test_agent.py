"""The command of a node, and when a run is finished; nothing is started."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.agent import attempt, outcome
from launcher.agent.attempt import Attempt
from launcher.agent.command import accelerate_command
from launcher.agent.machine import Start
from launcher.agent.supervise import check_unchanged, is_finished, run
from launcher.base.errors import DataError, UserError
from launcher.base.paths import RunPaths
from launcher.base.rank_reports import ATTEMPT, make_report, write_report
from launcher.base.timeline import note_ended
from launcher.config.changes import changed_settings
from launcher.config.settings import DataConfig, RunConfig, TrainConfig, to_dict


def test_command_gives_every_flag_when_two_nodes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = RunConfig()
    config.launch.num_processes, config.launch.num_machines = 4, 2
    config.launch.machine_rank, config.launch.main_process_ip = 1, "10.0.0.1"
    command = accelerate_command(config, ["seed=1"], port=29501, log_dir="/l")
    assert command[0] == sys.executable and command[-3:] == ["-m", "launcher.train", "seed=1"]
    flags = dict(itertools.pairwise(command[3:-2]))
    assert Path(flags["--config_file"]).is_file()
    wanted = {
        "--num_processes": "4", "--num_machines": "2", "--machine_rank": "1", "--main_process_ip": "10.0.0.1",
        "--main_process_port": "29501", "--rdzv_backend": "static", "--deepspeed_multinode_launcher": "standard",
        "--num_cpu_threads_per_process": "3",
    }  # fmt: skip
    assert wanted.items() <= flags.items()


@pytest.mark.parametrize(
    ("shell", "setting", "expected"),
    [("3", None, "3"), (" 2,1", None, "2"), ("3", "5", "5"), (None, "5", "5"), (None, 4, "4"), ("", None, "7")],
)
def test_threads_of_a_rank_are_those_that_were_asked_for(
    shell: str | None, setting: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.agent.command.num_cores", lambda: 14)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if shell is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", shell)
    config = RunConfig()
    config.launch.num_processes = 2
    config.launch.env = {} if setting is None else {"OMP_NUM_THREADS": setting}  # type: ignore[dict-item]
    command = accelerate_command(config, [], port=29501, log_dir="/l")
    assert command[command.index("--num_cpu_threads_per_process") + 1] == expected


def test_threads_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1e3")
    with pytest.raises(UserError, match="OMP_NUM_THREADS=1e3 is no number of threads"):
        accelerate_command(RunConfig(), [], port=29501, log_dir="/l")


@pytest.mark.parametrize(
    ("state", "asked", "finished"),
    [
        ({"state": "finished", "step": 20, "length": [20, 1.0, 32]}, 20, True),
        ({"state": "finished", "step": 20, "length": [20, 1.0, 32]}, 30, False),
        ({"state": "interrupted", "step": 20, "length": [20, 1.0, 32]}, 20, False),
        ({"state": "finished", "step": 20, "length": [-1, 1.0, 32]}, -1, True),
        ({"state": "finished", "step": 20, "length": [-1, 2.0, 32]}, -1, False),
        ({"state": "finished", "step": "20"}, 20, False),
        ({"state": ["finished"], "step": None}, 20, False),
    ],
)
def test_run_is_finished_only_when_no_more_steps_are_asked_for(
    state: dict[str, object], asked: int, finished: bool, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path)
    paths.run_state.write_text(json.dumps(state))
    config = RunConfig()
    config.train.max_steps = asked
    assert is_finished(config, paths) is finished


@pytest.mark.parametrize("name", ["logs", ".hub", "code", "slurm", "imported"])
def test_start_is_refused_before_anything_is_written_when_a_folder_of_the_run_is_a_link(
    tmp_path: Path, name: str
) -> None:
    outside, root = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    root.mkdir()
    (root / name).symlink_to(outside)
    config = RunConfig(output_dir=str(root))
    with pytest.raises(UserError, match="is a link to"):
        run(config, [])
    assert not list(outside.iterdir()) and [path.name for path in root.iterdir()] == [name]


def test_run_is_not_finished_when_run_json_is_broken(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.run_state.write_text("{")
    assert not is_finished(RunConfig(), paths)


def finished_run(root: Path, config: RunConfig) -> RunPaths:
    paths = RunPaths(root)
    root.mkdir()
    paths.config.write_text(yaml.safe_dump(to_dict(config)))
    paths.run_state.write_text(json.dumps({"state": "finished", "step": 20, "length": [20, 1.0, 32]}))
    return paths


def changed(config: RunConfig, **groups: dict[str, Any]) -> RunConfig:
    groups_now = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    return dataclasses.replace(config, **groups_now)


def test_finished_run_names_what_was_changed_and_the_command_for_each_wish(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path / "run"), train=TrainConfig(max_steps=20))
    paths = finished_run(tmp_path / "run", config)
    now = changed(config, optim={"learning_rate": 0.5}, model={"config": {"hidden_size": 8}})
    with pytest.raises(UserError) as caught:
        check_unchanged(now, paths)
    text = str(caught.value)
    assert "optim.learning_rate: 5e-05 in the run, 0.5 now" in text and "model.config: {} in the run" in text
    for wish in (
        "output_dir=",
        "checkpoint.accept_changes=true train.max_steps=N (N above 20)",
        "from_checkpoint=never",
    ):
        assert wish in text
    assert caught.value.exit_code == 2
    with pytest.raises(UserError):
        run(now, [])
    check_unchanged(changed(now, checkpoint={"accept_changes": True}), paths)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"metric_for_best_model": "contains"}, "'the highest eval_contains' now"),
        ({"greater_is_better": True}, "'the highest eval_loss' now"),
        ({"load_best_model_at_end": False}, "False now"),
        ({"metric_for_best_model": "eval_loss", "greater_is_better": False}, None),
    ],
)
def test_another_choice_of_the_best_is_named_when_the_run_is_finished(
    tmp_path: Path, now: dict[str, Any], told: str | None
) -> None:
    best = {"load_best_model_at_end": True}
    config = changed(
        RunConfig(output_dir=str(tmp_path / "run"), train=TrainConfig(max_steps=20)),
        eval={"eval_strategy": "steps"}, checkpoint=best,
    )  # fmt: skip
    paths = finished_run(tmp_path / "run", config)
    check_unchanged(config, paths)
    if told is None:
        check_unchanged(changed(config, checkpoint={**best, **now}), paths)
        return
    with pytest.raises(UserError, match="load_best_model_at_end: 'the lowest eval_loss' in the run, " + told):
        check_unchanged(changed(config, checkpoint={**best, **now}), paths)
    check_unchanged(changed(config, eval={"eval_strategy": "no"}, checkpoint=best), finished_run(
        tmp_path / "other", changed(config, eval={"eval_strategy": "no"}, checkpoint={**best, **now})
    ))  # fmt: skip


@pytest.mark.parametrize(
    "groups",
    [
        {"launch": {"num_processes": 4}, "strategy": {"name": "zero2"}, "tracker": {"name": None}},
        {
            "train": {"max_steps": 20, "logging_steps": 1, "per_device_train_batch_size": 1},
            "hub": {"push_to_hub": True},
        },
        {"data": {"train_files": ["/moved/rows.jsonl"], "cache_dir": "/x"}, "checkpoint": {"save_steps": 3}},
        {},
    ],
)
def test_finished_run_is_done_when_only_what_decides_nothing_was_changed(
    tmp_path: Path, groups: dict[str, dict[str, Any]]
) -> None:
    config = RunConfig(train=TrainConfig(max_steps=20), data=DataConfig(train_files=["rows.jsonl"]))
    paths = finished_run(tmp_path / "run", config)
    check_unchanged(changed(config, **groups), paths)


def test_fewer_steps_are_named_when_the_run_is_finished(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(max_steps=20))
    paths = finished_run(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"train\.max_steps: 20 steps in the run, 10 now"):
        check_unchanged(changed(config, train={"max_steps": 10}), paths)
    check_unchanged(changed(config, train={"max_steps": 10}, checkpoint={"accept_changes": True}), paths)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "optim: 3\n", "\0"])
def test_finished_run_is_done_when_its_old_settings_cannot_be_read(tmp_path: Path, text: str) -> None:
    config = RunConfig(train=TrainConfig(max_steps=20))
    paths = finished_run(tmp_path / "run", config)
    paths.config.write_text(text)
    check_unchanged(config, paths)


def test_setting_that_the_old_version_did_not_know_had_its_default() -> None:
    before = to_dict(RunConfig())
    del before["train"]["on_nonfinite"]
    assert changed_settings(before, RunConfig()) == []
    assert changed_settings(before, RunConfig(train=TrainConfig(on_nonfinite="skip"))) == [
        "train.on_nonfinite: 'stop' in the run, 'skip' now"
    ]


def test_stop_whose_save_failed_is_no_success(tmp_path: Path) -> None:
    """And no crash either: run.json keeps who asked, the agent ends with 1 and says what is lost."""
    told = {"attempt": "a", "state": "interrupted", "reason": "signal", "exit_code": 1, "error": "steps are lost"}
    RunPaths(tmp_path).run_state.write_text(json.dumps(told))
    found = outcome.judge(RunPaths(tmp_path), "a", [])
    assert (found.state, found.reason, found.exit_code, found.text) == ("interrupted", "signal", 1, "steps are lost")
    assert json.loads(RunPaths(tmp_path).run_state.read_text()) == told


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "model-00002-of-00002.safetensors"])
def test_finished_run_is_not_called_done_when_its_model_is_gone(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said that the model was in the folder. A checkpoint has it, so the same command puts it there again."""
    config = RunConfig(output_dir=str(tmp_path / "run"), train=TrainConfig(max_steps=20))
    config.launch.num_processes = 1
    paths = finished_run(tmp_path / "run", config)
    names = ["config.json", "model.safetensors"]
    if lost.startswith("model-"):
        names = ["config.json", "model-00001-of-00002.safetensors", lost]
        index = {"weight_map": {"a": names[1], "b": names[2]}}
        (paths.root / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names:
        (paths.root / name).write_bytes(b"{}")
    monkeypatch.setattr(Attempt, "run", lambda *_: pytest.fail("it was started"))
    monkeypatch.setenv("LAUNCHER_REPORT", "0")
    assert run(config, []) == 0
    assert "nothing to do. Its model is in that folder" in capsys.readouterr().out
    (paths.root / lost).unlink()
    assert run(config, []) == 0
    assert "Its model is not in that folder any more, and no checkpoint is" in capsys.readouterr().out
    paths.checkpoint_dir(20).mkdir()
    (paths.checkpoint_dir(20) / "manifest.json").write_text("{}")
    with pytest.raises(pytest.fail.Exception, match="it was started"):
        run(config, [])
    assert "it is taken from a checkpoint" in capsys.readouterr().err


def test_what_the_ranks_told_is_not_hidden_when_the_disk_of_the_run_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent ended with an error of its own about agent.log, and nobody heard that the model was not written."""

    def failed(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    paths = RunPaths(tmp_path)
    for name in ("open", "stat", "is_dir"):
        monkeypatch.setattr(Path, name, failed)
    assert attempt._text_from(paths.agent_log(), 0) == ""
    assert Attempt(RunConfig(output_dir=str(tmp_path)), paths, [])._stack_bytes(0) == 0
    assert outcome.newest_checkpoint(paths) is None
    note_ended(paths, "a", 0.0, {"state": "failed"})


def test_what_the_ranks_told_is_found_in_output_dir_when_temporary_files_had_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, empty = RunPaths(tmp_path / "run"), tmp_path / "empty"
    for folder in (paths.logs_dir, empty):
        folder.mkdir(parents=True)
    monkeypatch.setenv(ATTEMPT, "this")
    for rank in (0, 1):  # the other one is another machine's
        report = make_report(DataError(f"row of rank {rank}"), rank=rank, training_began=False, step=None)
        write_report(report, paths.logs_dir)
    made = Attempt(RunConfig(output_dir=str(paths.root)), paths, [])
    (found,) = made._reports(empty, Start(0, "this", 1, is_restart=False))
    assert (found["message"], found["exit_code"]) == ("row of rank 0", 2)
    assert made._reports(empty, Start(1, "another", 1, is_restart=True)) == []
