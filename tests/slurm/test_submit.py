"""What `launcher submit` leaves on disk, what it refuses, and arrays; on the real Slurm where Slurm has a say."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import cli
from launcher.base.errors import RunLockedError, SlurmError, SlurmUnavailableError, UserError
from launcher.config.settings import LaunchConfig, RunConfig
from launcher.slurm import ArrayJob, live_jobs, submit_array, submit_run
from launcher.slurm.snapshot import Snapshot, take_snapshot
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import StandInRun, SubmitStandIn, stand_in_config, stand_in_launch

# --------------------------------------------------------------------------- what Slurm refuses


@pytest.mark.parametrize(
    ("sbatch", "answer"),
    [
        ({"begin": "lots"}, "Invalid --begin specification"),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"partion": "low"}, "unrecognized option '--partion=low'"),
        ({"partion": "low"}, "Did you mean launch.sbatch.partition?"),
        ({"gres": "fpga:2"}, "launch.gpus_per_node=0"),
        ({"test-only": True}, "sbatch accepted the script but gave no job id"),
        ({"time": "2:00:00"}, "asked for: TimeLimit=02:00:00"),
        ({"cpus-per-task": 400}, "Slurm would never start the job: PartitionConfig"),
        ({"mem": "1T"}, "Memory specification can not be satisfied"),
    ],
)
def test_slurms_own_answer_is_shown_when_it_refuses(
    use_cluster: Cluster, sbatch: dict[str, object], answer: str
) -> None:
    with pytest.raises(SlurmError, match=re.escape(answer)):
        submit_run(RunConfig(output_dir="run", launch=LaunchConfig(sbatch=sbatch)))
    assert live_jobs([Path("run")]) == {}


def test_what_is_missing_is_said_when_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SlurmUnavailableError, match="sbatch was not found"):
        submit_run(RunConfig(output_dir="run"))


def test_submission_is_refused_while_a_job_of_that_folder_is_queued(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(sbatch={"hold": True})
    with pytest.raises(RunLockedError, match=f"scancel {run.job_id}"):
        submit_stand_in()
    run.cluster.run("scancel", run.job_id)
    wait_for(lambda: not live_jobs([run.root]), 60, "the job to leave the queue")


def test_slurm_reads_a_value_as_it_was_set_when_it_holds_quotes(use_cluster: Cluster, tmp_path: Path) -> None:
    comment = """a 'b' "c" \\ d\\" #e $HOME `id` é --wrap=f"""
    submission = submit_run(RunConfig(output_dir="run", launch=LaunchConfig(sbatch={"hold": True, "comment": comment})))
    assert use_cluster.run("squeue", "-h", "-j", submission.job_id, "-o", "%k").strip() == comment
    use_cluster.run("scancel", submission.job_id)
    modes = {
        p.name: stat.S_IMODE(p.stat().st_mode) for p in Path("run").rglob("*") if p.parent.name in ("run", "slurm")
    }
    assert {modes[name] for name in ("slurm", "logs", "code")} == {0o700}
    assert {modes[name] for name in ("job.sbatch", "config.yaml")} == {0o600}


# --------------------------------------------------------------------------- files


def test_folder_holds_script_config_and_code_when_submitted(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(sbatch={"hold": True})
    run.cluster.run("scancel", run.job_id)
    config = yaml.safe_load((run.root / "slurm" / "config.yaml").read_text())
    assert (config["output_dir"], config["launch"]["num_processes"]) == (str(run.root), 2)
    assert (run.root / "slurm" / "job.sbatch").read_text().startswith("#!/bin/bash")
    assert (run.root / "slurm" / "job_id").read_text() == f"{run.job_id}\n"
    train = run.root / "code" / "launcher" / "train" / "loop.py"
    assert train.is_file() and not train.stat().st_mode & stat.S_IWUSR
    assert (run.root / "code" / "launcher" / "agent" / "accelerate.yaml").is_file()


@pytest.mark.parametrize("name", ["verdict", "proof", "restarts", "job_id", "config.yaml"])
def test_submission_is_refused_when_a_folder_has_the_name_of_a_file_of_the_job(
    use_cluster: Cluster, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "run/slurm" / name / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(UserError, match=f"slurm/{name} is a folder"):
        submit_run(RunConfig(output_dir=str(tmp_path / "run"), launch=LaunchConfig(sbatch={"hold": True})))
    assert mine.is_dir()


@pytest.mark.timeout(60)
def test_links_and_pipes_in_place_of_files_of_the_job_are_replaced_when_submitted(
    use_cluster: Cluster, tmp_path: Path
) -> None:
    folder, outside = tmp_path / "run/slurm", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.write_text("mine")
    for name in ("verdict", "proof", "config.yaml"):
        (folder / name).symlink_to(outside)
    for name in ("restarts", "job_id", "unsaved.json"):
        os.mkfifo(folder / name)
    done = submit_run(RunConfig(output_dir=str(tmp_path / "run"), launch=LaunchConfig(sbatch={"hold": True})))
    use_cluster.run("scancel", done.job_id)
    assert outside.read_text() == "mine"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "job.sbatch", "job_id"]
    assert all(p.is_file() and not p.is_symlink() for p in folder.iterdir())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tracked, untracked, ignored and linked Python files."""
    (tmp_path / "outside.py").write_text("OUTSIDE = 'secret'\n", encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mod.py").write_text("OUTSIDE = 'secret'\n", encoding="utf-8")
    root = tmp_path / "checkout"
    for name in ("metric.py", "pkg/deep.py", "ignored/x.py", "outputs/old/code/y.py", "notes.txt", "private.py",
                 "mine/__init__.py", "mine/metric.py", "moved/z.py"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("", encoding="utf-8")
    (root / ".gitignore").write_text("ignored/\n", encoding="utf-8")
    (root / "outputs/old/code/.gitignore").write_text("*\n", encoding="utf-8")
    (root / "alias.py").symlink_to("pkg/deep.py")
    (root / "short").symlink_to("pkg")
    (root / "leak.py").symlink_to("../outside.py")
    (root / "absolute.py").symlink_to(root / "metric.py")
    (root / "to_private.py").symlink_to("private.py")
    monkeypatch.chdir(root)
    subprocess.run(["git", "init", "--quiet"], check=True)
    tracked = ["metric.py", "pkg", "alias.py", "short", "leak.py", "absolute.py", "to_private.py", "moved", "notes.txt"]
    subprocess.run(["git", "add", *tracked], check=True)
    return root


def own(snapshot: Snapshot) -> set[str]:
    return {name for name in snapshot.sources if not name.startswith("launcher/")}


def test_snapshot_holds_what_git_tracks_when_in_a_checkout(checkout: Path) -> None:
    (checkout / "moved").rename(checkout / "elsewhere")
    (checkout / "moved").symlink_to("../outside")
    snapshot = take_snapshot()
    assert own(snapshot) == {"metric.py", "pkg/deep.py", "alias.py", "short", "absolute.py"}
    untracked, left_out = snapshot.notices
    assert "mine/__init__.py" in untracked and "private.py" in untracked and "launch.code_files=[" in untracked
    assert "leak.py" in left_out and "to_private.py" in left_out


def test_snapshot_reads_nothing_through_a_link_when_a_tracked_folder_became_one(checkout: Path) -> None:
    (checkout / "moved/z.py").rename(checkout / "moved/mod.py")
    subprocess.run(["git", "add", "moved"], check=True)
    (checkout / "moved/mod.py").unlink()
    (checkout / "moved").rmdir()
    (checkout / "moved").symlink_to("../outside")
    take_snapshot().write(checkout / "code")
    assert not [
        p for p in (checkout / "code").rglob("*.py") if "secret" in p.read_text() and "OUTSIDE" in p.read_text()
    ]
    assert any("moved/mod.py" in notice for notice in take_snapshot().notices)


def test_snapshot_keeps_modes_and_links_when_written(checkout: Path) -> None:
    (checkout / "metric.py").chmod(0o600)
    (checkout / "pkg/deep.py").chmod(0o755)
    old = os.umask(0)
    try:
        take_snapshot().write(checkout / "code")
    finally:
        os.umask(old)
    code = checkout / "code"
    modes = [stat.S_IMODE((code / name).stat().st_mode) for name in ("metric.py", "pkg/deep.py", "")]
    assert modes == [0o400, 0o555, 0o700]
    assert str((code / "alias.py").readlink()) == "pkg/deep.py" and str((code / "short").readlink()) == "pkg"
    assert str((code / "absolute.py").readlink()) == "metric.py"
    assert all(p.resolve().is_relative_to(code) for p in code.rglob("*"))


def test_snapshot_holds_what_is_named_when_git_does_not_track_it(checkout: Path) -> None:
    snapshot = take_snapshot(["mine.metric.Metric", "torch.optim.AdamW", "metric.X", "not a module"], ["ignored/*.py"])
    assert {"mine/__init__.py", "mine/metric.py", "ignored/x.py"} <= own(snapshot)
    assert "mine" not in snapshot.notices[0] and "private.py" in snapshot.notices[0]
    for name in ("../outside.py", str(checkout / "metric.py"), "nothing*.py"):
        with pytest.raises(UserError, match=r"launch\.code_files"):
            take_snapshot([], [name])


def test_snapshot_leaves_out_a_pipe(checkout: Path) -> None:
    (checkout / "metric.py").unlink()
    os.mkfifo(checkout / "metric.py")
    assert "metric.py" not in own(take_snapshot())


def test_snapshot_walks_packages_only_when_not_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("metric.py", "pkg/__init__.py", "pkg/inner/deep.py", "data/huge.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    mine = {name for name in take_snapshot().sources if not name.startswith("launcher/")}
    assert mine == {"metric.py", "pkg/__init__.py", "pkg/inner/deep.py"}


def test_snapshot_is_replaced_as_a_whole_when_code_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.py").write_text("", encoding="utf-8")
    take_snapshot().write(tmp_path / "code")
    Path("old.py").rename("new.py")
    take_snapshot().write(tmp_path / "code")
    assert {p.name for p in (tmp_path / "code").glob("*.py")} == {"new.py"}
    assert [p.name for p in tmp_path.glob(".code.tmp*")] == []


# --------------------------------------------------------------------------- arrays


def test_array_runs_every_job_when_one_is_stopped_and_requeued(use_cluster: Cluster, tmp_path: Path) -> None:
    """The stopped task is requeued under its own id; the others are not touched; no more than two run at once."""
    sweep = tmp_path / "sweep"
    launch = stand_in_launch(tmp_path / "modules", num_steps=60, num_machines=1)
    jobs = [ArrayJob(sweep / f"seed={n}", stand_in_config(launch, run_name=f"s{n}")) for n in range(3)]
    (submission,) = submit_array(jobs, sweep, max_parallel=2)
    runs = [StandInRun(use_cluster, job.run_dir, f"{submission.job_id}_{n}", 60) for n, job in enumerate(jobs)]
    assert live_jobs(run.root for run in runs) == {run.root: run.job_id for run in runs}
    runs[0].wait_step(5)
    assert use_cluster.state(runs[2].job_id) == "PENDING"
    use_cluster.run("scancel", "--signal=TERM", runs[0].job_id)
    for run in runs:
        run.wait_completed()
    assert [run.reasons() for run in runs] == [["signal", None], [None], [None]]
    assert [use_cluster.job(run.job_id)["Restarts"] for run in runs] == ["1", "0", "0"]
    log = Path(submission.log.replace("%a", "0"))
    assert "stopped and saved: signal" in log.read_text()


def test_array_task_goes_on_in_another_job_when_requeue_is_refused(use_cluster: Cluster, tmp_path: Path) -> None:
    launch = stand_in_launch(tmp_path / "modules", num_steps=60, num_machines=1, sbatch={"requeue": False})
    jobs = [ArrayJob(tmp_path / f"seed={n}", stand_in_config(launch)) for n in range(2)]
    (submission,) = submit_array(jobs, tmp_path)
    stopped = StandInRun(use_cluster, jobs[1].run_dir, f"{submission.job_id}_1", 60)
    stopped.wait_step(5)
    use_cluster.run("scancel", "--signal=TERM", stopped.job_id)
    use_cluster.wait_state(stopped.job_id, "FAILED")
    stopped.job_id = (stopped.root / "slurm" / "job_id").read_text().strip()
    assert stopped.job_id.endswith("_1") and not stopped.job_id.startswith(f"{submission.job_id}_")
    stopped.wait_completed()
    StandInRun(use_cluster, jobs[0].run_dir, f"{submission.job_id}_0", 60).wait_completed()


def test_queued_array_keeps_its_script_and_code_when_more_jobs_are_added(use_cluster: Cluster, tmp_path: Path) -> None:
    launch = LaunchConfig(sbatch={"hold": True})

    def submit(name: str) -> Path:
        (submission,) = submit_array([ArrayJob(tmp_path / name, RunConfig(launch=launch))], tmp_path)
        use_cluster.run("scancel", submission.job_id)
        return submission.script

    first = submit("a")
    before = first.read_text()
    Path("added.py").write_text("", encoding="utf-8")
    second = submit("b")
    assert first != second and first.read_text() == before
    code_dirs = [re.search(r"code_dir=(.*)", script.read_text())[1] for script in (first, second)]  # type: ignore[index]
    assert code_dirs[0] != code_dirs[1] and all(Path(code).is_dir() for code in code_dirs)


# --------------------------------------------------------------------------- the command


def test_command_prints_job_and_log_when_submitted(use_cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["submit", "output_dir=run", "launch.sbatch.hold=true", "launch.num_machines=2"])
    out = capsys.readouterr().out
    assert code == 0
    job_id = re.search(r"submitted job (\d+)", out)[1]  # type: ignore[index]
    assert use_cluster.job(job_id)["NumNodes"] in ("2", "2-2")
    assert f"log: {Path('run').resolve()}/logs/slurm-{job_id}.log" in out
    use_cluster.run("scancel", job_id)


def test_command_says_so_when_the_run_is_finished(
    use_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"state": "finished", "step": 7}), encoding="utf-8")
    assert cli.main(["submit", "output_dir=run", "train.max_steps=7"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert use_cluster.run("squeue", "-h", "-n", "run") == ""
    assert cli.main(["submit", "output_dir=run", "train.max_steps=8", "launch.sbatch.hold=true"]) == 0
    use_cluster.run("scancel", Path("run/slurm/job_id").read_text().strip())


def test_command_exits_2_with_slurms_answer_when_refused(
    use_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "output_dir=run", "launch.sbatch.partition=nowhere"]) == 2
    assert "invalid partition specified: nowhere" in capsys.readouterr().err


def test_dry_run_prints_only_the_script_and_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from launcher import cli; code = cli.main(sys.argv[1:]);"
        "heavy = [m for m in ('torch', 'accelerate', 'transformers') if m in sys.modules];"
        "print(heavy, file=sys.stderr); sys.exit(code)"
    )
    env = {**os.environ, "SLURM_CONF": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script, "submit", "--dry-run", "output_dir=run", "launch.gpus_per_node=2"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]"
    for asked in ("launch.sbatch.time=", "launch.sbatch.cpus-per-task=16", "launch.sbatch.mem="):
        assert asked in done.stderr
    assert done.stdout.startswith("#!/bin/bash\n") and "#SBATCH --gpus-per-node=2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_config_of_the_job_is_the_composed_one(use_cluster: Cluster) -> None:
    assert cli.main(["submit", "output_dir=run", "launch.sbatch.hold=true", "train.max_steps=7"]) == 0
    use_cluster.run("scancel", Path("run/slurm/job_id").read_text().strip())
    config = yaml.safe_load(Path("run/slurm/config.yaml").read_text())
    assert config["train"]["max_steps"] == 7 and config["launch"]["name"] == "slurm"
    assert json.loads(Path("run/code/snapshot.json").read_text())["digest"] == take_snapshot().digest
