"""`launcher status` for runs, sweeps and folders of them; and what it reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import UserError
from launcher.base.process import boot_id, host, pid_namespace, start_ticks
from launcher.cli import status
from launcher.sweep.jobs import SweepPaths, SweepTable, is_sweep, job_process, read_job
from launcher.sweep.run import exit_code
from launcher.sweep.runs import Metric, MetricsTail, read_run
from launcher.sweep.table import show_table
from tests.sweep.runner import ROOT, SweepRunner
from tests.unprivileged import without_privileges

LOSS = Metric("eval_loss", is_greater_better=False)


def make_run(root: Path, state: str = "running", **fields: Any) -> Path:
    root.mkdir(parents=True)
    lines = [
        {"step": 10, "epoch": 0.1, "loss": 2.0, "tokens_per_second": 90.0}, {"step": 10, "eval_loss": 1.5},
        {"step": 20, "epoch": 0.2, "loss": 1.0, "tokens_per_second": 100.0}, {"step": 20, "eval_loss": 1.7},
        {"step": 30, "eval_loss": float("nan")},
    ]  # fmt: skip
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "ev')
    info = {"state": state, "reason": None, "step": 10, "total_steps": 50, "host": host(), "job_id": "77", **fields}
    (root / "run.json").write_text(json.dumps(info))
    (root / "config.yaml").write_text(
        "checkpoint: {metric_for_best_model: loss, greater_is_better: null}\neval: {eval_strategy: steps}\n"
    )
    (root / "checkpoint-10").mkdir()
    return root


def test_list_in_the_name_of_a_job_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.peft.target_modules=[q_proj],run=[bold]x[/y]"
    show_table(tmp_path, {name: read_run(make_run(tmp_path / "run"), LOSS)}, LOSS)
    assert name in capsys.readouterr().out


def hold_lock(root: Path, pid: int, ticks: int | None) -> None:
    here = {"host": host(), "boot_id": boot_id(), "pid_namespace": pid_namespace()}
    (root / ".lock").write_text(json.dumps({**here, "pid": pid, "pids": [[pid, ticks]]}))


def test_run_is_read_from_what_it_wrote_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    hold_lock(run, os.getpid(), start_ticks(os.getpid()))
    found = read_run(run, LOSS)
    assert (found.state, found.step, found.total_steps, found.epoch) == ("running", 20, 50, 0.2)
    assert (found.loss, found.tokens_per_second) == (1.0, 100.0)
    assert (found.best_metric, found.best_step, found.checkpoints) == (1.5, 10, [10])


def test_a_run_that_says_running_is_shown_as_crashed_when_its_process_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    hold_lock(run, os.getpid(), 1)  # the pid belongs to a process that started at another time
    assert status.main([str(run)]) == 0
    output = capsys.readouterr().out
    assert "interrupted (crash)" in output
    assert "20/50, epoch 0.2" in output
    assert "eval_loss 1.5 at step 10" in output
    assert "job 77" in output


def test_a_folder_lists_its_runs_and_sweeps(
    sweep: SweepRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a" / "b" / "run", state="finished")
    assert sweep.run("seed=1,2", "sweep.num_slots=2", STUB_FAIL="seed=2")[0] == 1
    assert status.main([str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in data["runs"]] == ["finished"]
    (found,) = data["sweeps"]
    assert found["metric"] == "eval_loss"
    assert found["states"] == {"failed": 1, "finished": 1}
    assert [(job["name"], job["state"]) for job in found["jobs"]] == [("seed=1", "finished"), ("seed=2", "failed")]
    assert found["jobs"][0]["swept"] == {"seed": "1"}
    assert status.main([str(sweep.root)]) == 0
    output = capsys.readouterr().out
    assert "1 finished, 1 failed" in output
    assert "4/4" in output


def test_run_that_lives_and_tells_nothing_is_shown_as_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", updated_at=time.time() - 600)
    hold_lock(run, os.getpid(), start_ticks(os.getpid()))
    assert status.main([str(run)]) == status.main([str(tmp_path)]) == 0
    assert len(re.findall(r"no step for 1\d min \d\d s", capsys.readouterr().out)) == 2


def test_job_in_the_queue_is_pending_with_slurms_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "bin/squeue"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\nprintf '7|PENDING|Resources\\n8|RUNNING|None\\n'\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    waiting, fresh = make_run(tmp_path / "waiting", state="interrupted", reason="preempted"), tmp_path / "fresh"
    for folder in (waiting, fresh):
        (folder / "slurm").mkdir(parents=True)
        (folder / "slurm/job_id").write_text("7\n")
    assert status.main([str(tmp_path), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert {Path(run["dir"]).name: (run["state"], run["slurm"]) for run in runs} == {
        "waiting": ("pending", "pending (Resources)"), "fresh": ("pending", "pending (Resources)")
    }  # fmt: skip


def test_watch_shows_it_again_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    sleeps = iter([None, KeyboardInterrupt()])

    def sleep(seconds: float) -> None:
        if (error := next(sleeps)) is not None:
            raise error

    monkeypatch.setattr("launcher.cli.status.time.sleep", sleep)
    assert status.main([str(run), "--watch"]) == 0
    assert capsys.readouterr().out.count("20/50") == 2


def test_watching_script_gets_a_line_when_something_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the run was only written down anew; a line is a whole object."""
    root = make_run(tmp_path / "run", updated_at=1.0)
    changes = [{"updated_at": 2.0}, {"updated_at": 3.0, "step": 20}, {}, {"state": "finished"}]

    def later(seconds: float) -> None:
        if not changes:
            raise KeyboardInterrupt
        info = json.loads((root / "run.json").read_text())
        (root / "run.json").write_text(json.dumps(info | changes.pop(0)))

    monkeypatch.setattr(status.time, "sleep", later)
    assert status.main([str(tmp_path), "--watch", "--json"]) == 0
    seen = [json.loads(line)["runs"][0] for line in capsys.readouterr().out.splitlines()]
    assert [run["state"] for run in seen] == ["interrupted", "finished"]


def test_status_needs_no_torch_and_says_what_is_wrong(tmp_path: Path) -> None:
    code = "import sys; from launcher.cli.status import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "no runs and no sweeps" in done.stdout
    with pytest.raises(UserError, match="is no folder"):
        status.main([str(tmp_path / "missing")])


def test_tail_reads_each_line_once_and_all_again_when_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.new_lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.new_lines() == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.new_lines() == [{"step": 3}]
    assert tail.new_lines() == []
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 4}\n{"step": 5}\n{"step": 6}\n')
    (tmp_path / "new").replace(path)
    assert [line["step"] for line in tail.new_lines()] == [1, 4, 5, 6]


@pytest.mark.parametrize(
    "content",
    ["", "garbage", "null", "[]", "5", '{"state": 5}', '{"state": "running", "step": "x", "total_steps": [], "hub": 5}',
     '{"host": 7, "job_id": 9, "updated_at": "yesterday"}', '{"epoch": {}, "exit_code": "x", "reason": []}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["run.json", "sweep.json", ".lock", "config.yaml", "logs/job.json"])
def test_odd_file_hides_no_other_run(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other tools have a run.json or sweep.json too, and a folder above them must still be shown."""
    make_run(tmp_path / "good", state="finished")
    odd = make_run(tmp_path / "odd", state="finished")
    (odd / "logs").mkdir()
    (odd / name).write_text(content)
    for folder in (odd, tmp_path):
        assert status.main([str(folder), "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert status.main([str(folder)]) == 0
        shown = capsys.readouterr().out
    assert f"finished     {tmp_path / 'good'}" in shown


@pytest.mark.parametrize(
    "line",
    [
        {"step": "a", "loss": None, "tokens_per_second": "x", "epoch": []},
        {"step": None, "eval_loss": True},
        {"loss": {}},
    ],
)
def test_odd_line_of_metrics_is_no_error(
    line: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert status.main([str(run)]) == status.main([str(run), "--json"]) == 0
    assert status.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "content", ['{"jobs": 5}', '{"jobs": {}, "metric": 7}', '{"metric": {"key": "x"}, "jobs": {}}']
)
def test_somebody_elses_sweep_json_makes_no_sweep(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert status.main([str(tmp_path)]) == 0
    assert "no runs and no sweeps" in capsys.readouterr().out


def test_job_whose_stop_could_not_save_goes_on_and_one_that_failed_does_not(tmp_path: Path) -> None:
    unsaved = make_run(tmp_path / "a", state="interrupted", reason="signal", exit_code=1)
    refused = make_run(tmp_path / "b", state="interrupted", reason="signal", exit_code=75)
    found = {}
    for folder, code in ((unsaved, 1), (refused, 2)):
        (folder / "logs").mkdir()
        (folder / "logs/job.json").write_text(json.dumps({"host": host(), "exit_code": code}))
        found[folder] = read_job(folder, LOSS)
    assert (found[unsaved].state, found[refused].state) == ("interrupted", "failed")
    assert exit_code(Any, {"a": found[unsaved]}, num_stops=1) == 1  # type: ignore[arg-type]


_SWEEP = {
    "format_version": 1, "metric": {"key": "eval_loss", "is_greater_better": False}, "info": {},
    "jobs": {"seed=1": {"swept": {"seed": "1"}, "overrides": ["seed=1"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("jobs", "seed=1"), 7),
        (("jobs", "seed=1"), None),
        (("jobs", "seed=1", "swept"), [1]),
        (("jobs", "seed=1", "swept"), {"seed": 1}),
        (("jobs", "seed=1", "overrides"), "seed=1"),
        (("jobs", "seed=1", "overrides"), [["seed=1"]]),
        (("jobs", "../other"), {"swept": {}, "overrides": []}),
        (("jobs", ".."), {"swept": {}, "overrides": []}),
        (("jobs", ""), {"swept": {}, "overrides": []}),
        (("jobs", "a\0b"), {"swept": {}, "overrides": []}),
        (("metric", "key"), 7),
        (("metric", "key"), ["eval_loss"]),
        (("metric", "is_greater_better"), "no"),
        (("jobs",), []),
        ((), "text"),
    ],
)
def test_a_list_of_jobs_is_refused_by_name_when_a_value_has_another_type(
    path: tuple[str, ...], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`launcher status` shows no sweep there, and a start does not overwrite it."""
    sweep, whole = tmp_path / "sweep", json.loads(json.dumps(_SWEEP))
    make_run(sweep / "seed=1")
    make_run(tmp_path / "other", step=999)
    (sweep / "sweep.json").write_text(json.dumps(whole))
    assert is_sweep(sweep) and list(SweepTable(SweepPaths(sweep)).jobs) == ["seed=1"]
    node = whole
    for key in path[:-1]:
        node = node[key]
    whole = {**whole, "metric": None} if not path else whole
    if path:
        node[path[-1]] = value
    (sweep / "sweep.json").write_text(json.dumps(whole))
    assert status.main([str(sweep)]) == status.main([str(sweep), "--json"]) == 0
    assert "999" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        SweepTable(SweepPaths(sweep))
    assert json.loads((sweep / "sweep.json").read_text()) == whole


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "empty"])
def test_a_sweep_is_not_started_when_something_else_has_the_name_of_its_list(kind: str, tmp_path: Path) -> None:
    table = tmp_path / "sweep.json"
    match kind:
        case "folder":
            table.mkdir()
        case "link":
            table.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(table)
        case _:
            table.touch()
    assert not is_sweep(tmp_path)
    with pytest.raises(UserError, match=r"mv .*sweep\.json"):
        SweepTable(SweepPaths(tmp_path))


@pytest.mark.parametrize(
    ("changed", "is_living"),
    [
        ({}, True),
        ({"boot_id": "another boot"}, False),
        ({"boot_id": None}, False),
        ({"pid_namespace": "pid:[4026532999]"}, False),
        ({"ticks": 1}, False),
        ({"ticks": None}, False),
        ({"pid": 1, "ticks": None}, False),
        ({"pid": -1}, False),
        ({"pid": True}, False),
        ({"pid": str(os.getpid())}, False),
        ({"pid": 10**30}, False),
        ({"exit_code": 0}, False),
        ({"host": "another name of this machine"}, True),
    ],
)
def test_a_process_is_taken_for_a_jobs_only_when_boot_namespace_and_start_say_so(
    changed: dict[str, Any], is_living: bool, tmp_path: Path
) -> None:
    """Containers share host names, and their pids mean other processes; what lives is waited for and signalled."""
    ticks = start_ticks(os.getpid())
    me = {"pid": os.getpid(), "ticks": ticks, "host": host(), "boot_id": boot_id(), "pid_namespace": pid_namespace()}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.json").write_text(json.dumps({**me, **changed}))
    assert job_process(tmp_path) == (os.getpid() if is_living else None)
    assert (read_job(tmp_path, LOSS).state == "running") is is_living


def test_run_of_a_colleague_is_shown_when_its_uploads_are_private(tmp_path: Path) -> None:
    told = {"pushed": [], "pending": ["checkpoint-10"], "last_error": "it is down", "command": "launcher push run"}
    run = make_run(tmp_path / "run", hub=told)
    (run / ".hub/queue").mkdir(parents=True)
    (run / ".hub").chmod(0)
    with without_privileges():
        (shown,) = status.as_data(tmp_path)["runs"]
    assert shown["hub"] == told
