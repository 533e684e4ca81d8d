"""Promise 3: whatever a folder holds that was received or damaged, every command ends well or with an error by name.

Each case changes one file of a run, of a checkpoint or of a Trainer's checkpoint, by its structure, its bytes or its
kind, often with hashes that fit again, and gives it to a reader in this process. Seeded: a case is named by its number.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from launcher.checkpoint.resume import find
from launcher.cli import checkpoints, status, verify
from launcher.config.settings import RunConfig
from launcher.hub import fetch
from launcher.saving.interop.importing import import_checkpoint
from launcher.saving.interop.serving import export_safetensors
from launcher.saving.interop.trainer_export import export_trainer
from tests.decoy import Decoy
from tests.faults.file_layer import OneProcess
from tests.faults.mutations import Mutator
from tests.faults.sandbox import Sandbox, problem_of, read_only
from tests.interop.folders import config_of, llama, write_our_folder, write_trainer_folder, write_zero2_folder


class Lab:
    """All sandboxes and all readers."""

    def __init__(self, root: Path) -> None:
        self.decoy = Decoy(root / "decoy")
        self.run = _run_folder(root / "run")
        self.ours = _our_folder(root / "ours/checkpoint-10", llama())
        write_trainer_folder(root / "theirs/checkpoint-10")
        write_zero2_folder(root / "zero/checkpoint-10")
        self.foreign = [Sandbox(root / "theirs/checkpoint-10"), Sandbox(root / "zero/checkpoint-10")]
        self.out, self.import_dir = root / "out", root / "imported run"
        self.config: RunConfig = config_of(self.import_dir)
        self.readers: list[tuple[float, str, Callable[[Mutator], tuple[Sandbox, Callable[[], Any]]]]] = [
            (0.22, "checkpoints", lambda m: (self.run, lambda: self._command(checkpoints.main, m))),
            (0.24, "status", lambda m: (self.run, lambda: self._command(status.main, m))),
            (0.18, "verify", lambda m: (self.run, lambda: read_only(lambda: verify.main([str(self.run.root)])))),
            (0.25, "resume", lambda m: (self.run, self._resume)),
            (0.06, "fetch", lambda m: (self.run, self._fetch)),
            (0.025, "import", self._import),
            (0.025, "export", lambda m: (self.ours, lambda: self._export(m))),
        ]

    def one(self, seed: str) -> str | None:
        """A case; says what went wrong in it."""
        mutator = Mutator(seed, self.decoy.root / "a")
        _, name, reader = mutator.random.choices(self.readers, [share for share, *_ in self.readers])[0]
        self.last = name
        sandbox, read = reader(mutator)
        with sandbox.changed(mutator) as what:
            before = set(files.list_files(sandbox.root))
            problem = problem_of(read)
            if name != "resume" and set(files.list_files(sandbox.root)) != before:
                problem = "files of the folder were made or deleted"
        if touched := self.decoy.disturbed():
            problem = f"outside: {touched}"
        for left in (self.out, self.import_dir):
            shutil.rmtree(left, ignore_errors=True)
        return f"{name}, case {seed}, {what}: {problem}" if problem else None

    def _command(self, main: Callable[[list[str]], int], mutator: Mutator) -> None:
        more = [] if mutator.random.random() < 0.2 else ["--json"]
        read_only(lambda: main([str(self.run.root), *more]))

    def _resume(self) -> None:
        find("auto", RunPaths(self.run.root), OneProcess(), lambda folder: folder)  # type: ignore[arg-type]

    def _fetch(self) -> None:
        folder = self.run.root / "checkpoint-20"
        with contextlib.suppress(FileNotFoundError):
            wanted = manifest.read(folder)
            fetch._refuse_model_only(wanted, "checkpoint-20", "hf://a/b", "a/b")
            assert all((folder / entry.path).is_relative_to(folder) for entry in wanted.files)

    def _import(self, mutator: Mutator) -> tuple[Sandbox, Callable[[], Any]]:
        sandbox = mutator.random.choice(self.foreign)
        return sandbox, lambda: import_checkpoint(sandbox.root, self.config, RunPaths(self.import_dir))

    def _export(self, mutator: Mutator) -> None:
        if mutator.random.random() < 0.5:
            export_safetensors(self.ours.root, self.out, dtype="bfloat16", max_shard_bytes=10**9)
        else:
            export_trainer(self.ours.root, self.out, dtype=None, max_shard_bytes=10**9)


def _our_folder(folder: Path, model: LlamaForCausalLM) -> Sandbox:
    """A checkpoint as a run of one process leaves it."""
    write_trainer_folder(folder.parent / "theirs/checkpoint-10")
    config = config_of(folder.parent / "source")
    made = import_checkpoint(folder.parent / "theirs/checkpoint-10", config, RunPaths(folder.parent / "source"))
    made.rename(folder)
    shutil.rmtree(folder.parent / "theirs")
    return Sandbox(folder)


def _run_folder(root: Path) -> Sandbox:
    for step in (10, 20):
        model = torch.nn.Linear(2, 2)
        model.config = llama().config  # type: ignore[assignment]
        write_our_folder(root / f"checkpoint-{step}", model, torch.float32, step=step, best=10)  # type: ignore[arg-type]
    history = [{"step": step, "loss": 1.5, "eval_loss": 1.25, "epoch": 0.5} for step in (10, 20)]
    lines = [{"step": 10, "loss": 1.5, "tokens_per_second": 9.5, "epoch": 0.5}, {"step": 20, "eval_loss": 1.25}]
    state = {
        "step": 20, "total_steps": 40, "samples_seen": 160, "world_size": 1, "settings": {"seed": 1}, "scaler": None,
        "progress": {"step": 20, "epoch": 0.5}, "scheduler": {"values": {}}, "optimizer": {"groups": []},
        "origin": None,
    }  # fmt: skip
    run = {
        "state": "interrupted", "reason": "signal", "exit_code": 75, "step": 20, "total_steps": 40, "epoch": 0.5,
        "host": "a", "job_id": "7", "updated_at": 1.7e9, "hub": {"pushed": ["checkpoint-10"], "pending": [], "x": 1},
    }  # fmt: skip
    folder = root / "checkpoint-20"
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "epoch": 0.5, "best_global_step": 10,
                                                           "log_history": history}))  # fmt: skip
    (folder / "state/state.json").write_text(json.dumps(state))
    (folder / manifest.NAME).write_bytes(manifest.build(folder, step=20, world_size=1, zero_stage=0).to_json())
    (root / "run.json").write_text(json.dumps(run))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "config.yaml").write_text("checkpoint: {metric_for_best_model: loss, greater_is_better: null}\n"
                                      "eval: {eval_strategy: steps}\n")  # fmt: skip
    return Sandbox(root)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("nonsense"))


def check(lab: Lab, cases: range) -> None:
    with warnings.catch_warnings(action="ignore"):
        problems = [problem for case in cases if (problem := lab.one(str(case)))]
    assert problems == [], f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems[:5])


def test_every_error_has_a_name_when_files_hold_nonsense(lab: Lab) -> None:
    check(lab, range(1200))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2000, 52_000, 10_000))
def test_every_error_has_a_name_when_files_hold_nonsense_fifty_thousand_times(lab: Lab, first: int) -> None:
    check(lab, range(first, first + 10_000))


def test_a_decoy_notices_what_is_done_to_it(tmp_path: Path) -> None:
    decoy = Decoy(tmp_path / "decoy")
    assert decoy.disturbed() == []
    (tmp_path / "decoy/deep/b").write_text("other")
    (tmp_path / "decoy/new").write_text("")
    (tmp_path / "decoy/a").unlink()
    assert [Path(p).name for p in decoy.disturbed()] == ["a", "b", "new"]
