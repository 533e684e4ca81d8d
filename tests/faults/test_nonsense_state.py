"""Promise 3, as in test_nonsense.py: what loads a training state, and what reads a sweep with its jobs and locks."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base import files, lock, lock_file
from launcher.base.paths import RunPaths
from launcher.checkpoint.resume import find
from launcher.cli import report, status
from launcher.config.compose import compose_arguments
from launcher.data import build_vocabulary
from launcher.model.build import build_model
from launcher.model.optim import Schedule, build_optimizer
from launcher.saving.training_state import TrainingState
from launcher.sweep.jobs import Job, JobRecord, SweepPaths, SweepTable, job_record, needs_run, read_job
from launcher.sweep.runs import Metric
from launcher.train.build import compared, result_settings
from tests.decoy import Decoy
from tests.distributed.runs import Lab
from tests.faults.file_layer import OneProcess
from tests.faults.mutations import Mutator
from tests.faults.sandbox import Sandbox, problem_of, read_only

Read = Callable[[Mutator], Any]


class StateReader:
    """A run's folder, and what a start does with it up to its first step, in this process."""

    def __init__(self, lab: Lab, root: Path) -> None:
        run = lab.run(root / "run", "single", 1, "train.max_steps=4", "checkpoint.save_steps=2", "seed=3")
        for left in [run.lock, *run.root.glob("*.html")]:
            left.unlink(missing_ok=True)
        shutil.rmtree(run.logs_dir)
        self.sandbox = Sandbox(run.root)
        self.sandbox.content = {n: data for n, data in self.sandbox.content.items() if n.startswith("checkpoint-4/")}
        overrides = [*lab.overrides(run.root, "single"), "train.max_steps=4", "checkpoint.save_steps=2", "seed=3"]
        self._config = compose_arguments(overrides)
        self._tokenizer = build_vocabulary(self._config).tokenizer
        self.load()  # all imports, before time is taken

    def read(self) -> None:
        paths, processes, config = RunPaths(self.sandbox.root), OneProcess(), self._config
        point, _ = find("auto", paths, processes, lambda folder: folder)  # type: ignore[arg-type]
        assert point is not None, "there is always the older checkpoint"
        compared(config, point, result_settings(config, "rows", processes) | {"data": None}, 4)  # type: ignore[arg-type]

    def load(self) -> None:
        paths, processes, config = RunPaths(self.sandbox.root), OneProcess(), self._config
        point, _ = find("auto", paths, processes, lambda folder: folder)  # type: ignore[arg-type]
        assert point is not None, "there is always the older checkpoint"
        built = build_model(config, self._tokenizer, resumed_from=point.folder)
        optimizer = build_optimizer(config, built.module)
        state = TrainingState(
            config, paths, processes, built.module, optimizer, Schedule(config, optimizer, 4), None, 4,  # type: ignore[arg-type]
            built.stored,
        )  # fmt: skip
        state.load(point.folder)


class SweepReader:
    """A sweep's folder with two jobs, of which one has crashed."""

    def __init__(self, root: Path) -> None:
        self.paths, self._out = SweepPaths(root / "sweep"), root / "out.html"
        jobs = [
            Job(f"seed={n}", self.paths.root / f"seed={n}", {"seed": str(n)}, (f"seed={n}",), ("a", "b"))
            for n in (1, 2)
        ]
        table = SweepTable(self.paths)
        table.add(jobs)
        table.write(Metric("eval_loss", False), command=["launcher", "train"], started_at=1.7e9)
        for n, job in enumerate(jobs):
            run = RunPaths(job.output_dir)
            run.logs_dir.mkdir(parents=True)
            state = {"state": ("finished", "running")[n], "exit_code": 0, "step": 20, "total_steps": 20, "epoch": 1.5}
            run.run_state.write_text(json.dumps({**state, "host": "a", "updated_at": 1.7e9}))
            lines = [{"step": 10, "loss": 1.5, "tokens_per_second": 9.5}, {"step": 20, "eval_loss": 1.25, "epoch": 1.5}]
            run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            record = {
                "pid": 10**6,
                "ticks": 5,
                "boot_id": "x",
                "pid_namespace": "y",
                "exit_code": n,
                "overrides": ["s"],
            }
            job_record(job.output_dir).write_text(json.dumps({**record, "host": "a", "devices": [0]}))
            (run.root / ".lock").write_bytes(lock._content("0123456789abcdef", [10**6]))
        self.paths.lock.write_bytes(lock._content("0123456789abcdef", [10**6]))
        self.jobs, self.sandbox = jobs, Sandbox(self.paths.root)

    def status(self, mutator: Mutator) -> None:
        more = [] if mutator.random.random() < 0.5 else ["--json"]
        read_only(lambda: status.main([str(self.paths.root), *more]))

    def report(self, mutator: Mutator) -> None:
        try:
            report.main([str(self.paths.root), "-o", str(self._out)])
        finally:
            self._out.unlink(missing_ok=True)

    def table(self, mutator: Mutator) -> None:
        table = SweepTable(self.paths)
        table.known_name(["seed=1"])
        for name, found in table.statuses().items():
            assert (self.paths.root / name).parent == self.paths.root
            assert found.state
        for job in self.jobs:
            needs_run(job, read_job(job.output_dir, table.metric), retry_failed=True)
            assert JobRecord.read(job.output_dir).living_pid is None, "no process of ours may be signalled"

    def locks(self, mutator: Mutator) -> None:
        for path in (self.paths.lock, *(job.output_dir / ".lock" for job in self.jobs)):
            holder = lock_file.read(path)
            if holder is not None:
                assert str(holder) and lock_file.describe(holder) and holder.is_dying in (True, False)
            lock.holder(path)


@pytest.fixture(scope="module")
def readers(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Sandbox, Read]]:
    root = tmp_path_factory.mktemp("state")
    state, sweep = StateReader(lab, root), SweepReader(root)
    return {
        "state": (state.sandbox, lambda _: state.load()), "settings": (state.sandbox, lambda _: state.read()),
        "sweep status": (sweep.sandbox, sweep.status), "sweep report": (sweep.sandbox, sweep.report),
        "sweep table": (sweep.sandbox, sweep.table), "locks": (sweep.sandbox, sweep.locks),
    }  # fmt: skip


def check(readers: dict[str, tuple[Sandbox, Read]], root: Path, name: str, cases: range) -> None:
    decoy, (sandbox, read), problems = Decoy(root / "decoy"), readers[name], []
    with warnings.catch_warnings(action="ignore"):
        for case in cases:
            mutator = Mutator(f"{name} {case}", decoy.root / "a")
            with sandbox.changed(mutator) as what:
                before = set(files.list_files(sandbox.root))
                problem = problem_of(lambda mutator=mutator: read(mutator))  # type: ignore[misc]
                if name not in ("state", "settings") and set(files.list_files(sandbox.root)) != before:
                    problem = "files of the folder were made or deleted"
            if touched := decoy.disturbed():
                problem = f"outside: {touched}"
            problems += [f"case {case}, {what}: {problem}"] if problem else []
    assert problems == [], f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems[:5])


_NAMES = ["state", "settings", "sweep status", "sweep report", "sweep table", "locks"]


@pytest.mark.parametrize("name", _NAMES)
def test_every_error_has_a_name_when_state_or_sweep_is_nonsense(
    readers: dict[str, tuple[Sandbox, Read]], tmp_path: Path, name: str
) -> None:
    check(readers, tmp_path, name, range(20 if name == "state" else 60))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [(n, {"state": 1000, "settings": 2000, "sweep report": 1000}.get(n, 4000)) for n in _NAMES]
)
def test_every_error_has_a_name_when_state_or_sweep_is_nonsense_many_times(
    readers: dict[str, tuple[Sandbox, Read]], tmp_path: Path, name: str, count: int
) -> None:
    check(readers, tmp_path, name, range(1000, 1000 + count))


def test_sweep_is_shown_when_a_state_is_markup_and_a_number_beyond_floats(tmp_path: Path) -> None:
    sweep = SweepReader(tmp_path)
    run = RunPaths(sweep.jobs[0].output_dir)
    run.run_state.write_text('{"state": "[/x]", "step": 3}')
    run.metrics.write_text('{"step": 1, "loss": 1.5, "epoch": 1' + "0" * 400 + "}\n")
    mutator = Mutator("none", tmp_path)
    for read in (sweep.status, sweep.status, sweep.status, sweep.report):
        assert problem_of(lambda read=read: read(mutator)) == ""  # type: ignore[misc]
