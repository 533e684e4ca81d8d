"""Promise 2: on another number of processes or another ZeRO stage a run continues with the same samples and losses."""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.base import json_lines
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, log_text, losses, state, tensors

Size = tuple[str, int]

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
SIZES: list[Size] = [("single", 1), *itertools.product(STRATEGIES, (1, 2, 3, 4))]
_NO_DROPOUT = ("model.config.attention_dropout=0.0",)
"""Dropout's stream belongs to a process, so it differs with their number; everything else is compared."""


def _slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclass
class Reference:
    """Undisturbed runs, one of each size, made when they are first needed."""

    lab: Lab
    extra: tuple[str, ...] = _NO_DROPOUT
    made: dict[Size, RunPaths] = field(default_factory=dict)

    def run(self, size: Size) -> RunPaths:
        if size not in self.made:
            folder = self.lab.folder / "-".join(["reference", *map(str, size), str(abs(hash(self.extra)))])
            self.made[size] = self.lab.run(folder, *size, *self.extra)
        return self.made[size]

    def continued(self, source: Size, target: Size, folder: Path) -> RunPaths:
        """The run of `source` up to step 10, continued as `target`."""
        start(self.run(source), folder)
        return self.lab.run(folder, *target, *self.extra)


def start(run: RunPaths, folder: Path) -> None:
    """A copy of a run as it was when it was killed after its save at step 10."""
    folder.mkdir()
    shutil.copytree(run.checkpoint_dir(10), folder / "checkpoint-10")
    shutil.copyfile(run.metrics, folder / "metrics.jsonl")


@pytest.fixture(scope="session")
def reference(lab: Lab) -> Reference:
    return Reference(lab)


def check_losses(expected: RunPaths, found: RunPaths, relative: float = 1e-4, first: float = 1e-5) -> None:
    """The losses of steps 11 to 20, which are those of the same samples."""
    a, b = losses(expected), losses(found)
    assert sorted(a) == sorted(b) == list(range(1, 21))
    errors = [abs(a[k] - b[k]) / abs(a[k]) for k in range(11, 21)]
    assert errors[0] <= first, errors
    assert max(errors) <= relative, errors
    assert a[20] < a[1], "nothing was learned, so equal losses mean little"


def check_pair(reference: Reference, source: Size, target: Size, folder: Path) -> None:
    found = reference.continued(source, target, folder)
    check_losses(reference.run(source), found)
    before, after = state(found.checkpoint_dir(10)), state(found.checkpoint_dir(20))
    assert (before["strategy"], before["world_size"]) == source
    assert (after["strategy"], after["world_size"]) == target
    assert after["samples_seen"] == 2 * before["samples_seen"] == 160
    assert "equal up to rounding from here" in log_text(folder) or source == target


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("zero2", 2), ("zero3", 3)),
        (("zero3", 3), ("ddp", 2)),
        (("ddp", 2), ("zero1", 4)),
        (("zero3", 3), ("single", 1)),
    ],
)
def test_losses_equal_when_continued_at_another_size(
    reference: Reference, tmp_path: Path, source: Size, target: Size
) -> None:
    check_pair(reference, source, target, tmp_path / "run")


def _pairs() -> list[tuple[Size, Size]]:
    """Every strategy to every other and every number of processes to every other, four times each, by a fixed draw."""
    pairs = [(a, b) for a, b in itertools.product(SIZES, SIZES) if a != b]
    random.Random(4).shuffle(pairs)
    chosen, seen = [], dict[tuple[object, object], int]()
    for a, b in pairs:
        keys = [(a[0], b[0]), (a[1], b[1])]
        if any(seen.get(key, 0) < 1 for key in keys):
            chosen.append((a, b))
            for key in keys:
                seen[key] = seen.get(key, 0) + 1
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), _pairs(), ids=lambda s: f"{s[0]}x{s[1]}")
def test_losses_equal_in_the_matrix(reference: Reference, tmp_path: Path, source: Size, target: Size) -> None:
    check_pair(reference, source, target, tmp_path / "run")


@pytest.mark.parametrize(("source", "target"), [(("zero2", 2), ("zero3", 3)), _slow(("ddp", 2), ("zero2", 3))])
def test_stored_state_is_bit_identical_when_gone_through_another_size_and_back(
    lab: Lab, reference: Reference, tmp_path: Path, source: Size, target: Size
) -> None:
    """Resumed at another size past its end, a run stores what it has loaded; and so does the first size again."""
    first = reference.run(source).checkpoint_dir(10)
    there = resave(lab, first, tmp_path / "there", target)
    back = resave(lab, there, tmp_path / "back", source)
    assert different(first, there) == []
    assert different(first, back) == []
    assert groups(first) == groups(there) == groups(back)


def groups(checkpoint: Path) -> list[tuple[list[str], dict[str, float], float]]:
    """Names, step counts and weight decay of each parameter group."""
    stored = state(checkpoint)["optimizer"]["groups"]
    return [(g["params"], g["scalars"], g["settings"]["weight_decay"]) for g in stored]


def resave(lab: Lab, checkpoint: Path, folder: Path, size: Size) -> Path:
    """Loads a checkpoint in a folder of its own and saves it again without a step in between."""
    run = lab.run(
        folder, *size, *_NO_DROPOUT, "train.max_steps=10", f"checkpoint.resume_from_checkpoint={checkpoint}",
        "checkpoint.accept_changes=true",
    )  # fmt: skip
    return run.checkpoint_dir(10)


def test_samples_of_every_step_are_the_same_at_any_size() -> None:
    """By number: the rows that the processes of a step take together are those of the step, each once."""
    from launcher.data import StepSampler, split_step

    sampler = StepSampler(37, 8, 42)
    for step in range(30):
        rows = sampler.rows_of_step(step)
        for world, per_device in itertools.product((1, 2, 3, 4, 5, 11), (1, 2, 3, 8)):
            parts = [split_step(rows, rank, world, per_device) for rank in range(world)]
            assert len({len(p) for p in parts}) == 1, "the processes make different numbers of micro-steps"
            taken = np.concatenate([ids for part in parts for ids in part])
            assert sorted(taken) == sorted(rows)
            assert max(len(ids) for part in parts for ids in part) <= per_device


@dataclass(frozen=True)
class Observed:
    """What `observed.py` told of one run, from all its processes."""

    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path, world_size: int) -> Observed:
        paths = list(folder.glob(f"world-{world_size}-rank-*.jsonl"))
        assert len(paths) == world_size
        return cls([line for path in paths for line in json_lines.read(path)])

    def samples(self) -> dict[int, list[int]]:
        """The rows that entered each optimizer step, over all its processes and micro-steps."""
        found: dict[int, list[int]] = {}
        for line in self.lines:
            if "ids" in line:
                found.setdefault(line["step"], []).extend(line["ids"])
        return {step: sorted(ids) for step, ids in found.items()}


def _observed(lab: Lab, folder: Path, size: Size, seen: Path, *more: str) -> Observed:
    seen.mkdir()
    observing = "optim.name=tests.distributed.observed.ObservedAdamW"
    lab.run(folder, *size, *more, observing, env={"OBSERVED_DIR": str(seen)})
    return Observed.of(seen, size[1])


def test_samples_that_enter_each_step_of_a_run_are_the_same_when_continued_at_another_size(
    lab: Lab, tmp_path: Path
) -> None:
    """Seen where the batches are made, in real runs: 37 rows, 8 in a step, so epochs end inside of steps."""
    source = ("zero2", 2)
    undisturbed = _observed(lab, tmp_path / "undisturbed", source, tmp_path / "seen", *_NO_DROPOUT).samples()
    assert sorted(undisturbed) == list(range(1, 21))
    assert all(len(ids) == 8 for ids in undisturbed.values())
    epochs = [i for step in range(1, 21) for i in undisturbed[step]]
    assert sorted(epochs[:32]) != sorted(set(range(37)))[:32] and len(set(epochs)) == 37
    for size in (("zero3", 3), ("ddp", 4), ("single", 1)):
        name = "-".join(map(str, size))
        start(RunPaths(tmp_path / "undisturbed"), tmp_path / name)
        found = _observed(lab, tmp_path / name, size, tmp_path / f"seen-{name}", *_NO_DROPOUT).samples()
        assert found == {step: undisturbed[step] for step in range(11, 21)}


_LARGE = (
    "model.config.hidden_size=512", "model.config.intermediate_size=1024", "model.config.num_hidden_layers=4",
    "model.config.vocab_size=4096", "train.train_batch_size=4", "train.per_device_train_batch_size=1",
)  # fmt: skip
"""15 million parameters, so that what is measured is not lost among megabytes of other things."""


def test_loading_takes_no_more_memory_than_the_own_share_half_as_much_again_and_one_tensor(
    lab: Lab, tmp_path: Path
) -> None:
    """At the size of the save and at others, stages and processes, masters included."""
    short = (*_LARGE, "train.max_steps=2", "checkpoint.save_steps=1")
    _observed(lab, tmp_path / "saved", ("zero2", 2), tmp_path / "seen", *short)
    saved = RunPaths(tmp_path / "saved").checkpoint_dir(1)
    for size in (("zero2", 2), ("zero3", 3), ("ddp", 2)):
        name = "-".join(map(str, size))
        shutil.copytree(saved, tmp_path / name / "checkpoint-1")
        observed = _observed(lab, tmp_path / name, size, tmp_path / f"seen-{name}", *short)
        costs = [line for line in observed.lines if "peak" in line]
        assert len(costs) == size[1]
        for cost in costs:
            assert cost["share"] > 50e6
            assert cost["peak"] < 1.5 * cost["share"] + cost["largest"], cost
            assert cost["peak"] > 0.7 * cost["share"], f"the state was not loaded while it was watched: {cost}"


_SGD = ("optim=sgd", "optim.name=torch.optim.SGD", "optim.learning_rate=0.3")
_ADAFACTOR = ("optim=adafactor", "optim.name=torch.optim.Adafactor")
_BFLOAT16 = ("model.dtype=bfloat16",)
_LORA = ("model/peft=lora", "model.peft.r=4", "optim.learning_rate=1e-3")


def _stored_states(checkpoint: Path) -> set[str]:
    return {k.split()[1].partition(".")[0] for k in tensors(checkpoint) if k.startswith("optimizer ")}


@pytest.mark.parametrize(
    ("settings", "source", "target", "states"),
    [
        (_SGD, ("ddp", 2), ("zero2", 3), {"momentum_buffer"}),
        _slow(_SGD, ("zero3", 2), ("zero2", 3), {"momentum_buffer"}),
        (_ADAFACTOR, ("single", 1), ("ddp", 3), {"row_var", "col_var", "variance"}),
    ],
    ids=["sgd-from-ddp", "sgd-from-zero3", "adafactor"],
)
def test_other_optimizers_continue(
    lab: Lab, tmp_path: Path, settings: tuple[str, ...], source: Size, target: Size, states: set[str]
) -> None:
    reference = Reference(lab, (*_NO_DROPOUT, *settings, "optim.weight_decay=0.1"))
    found = reference.continued(source, target, tmp_path / "run")
    check_losses(reference.run(source), found)
    assert _stored_states(found.checkpoint_dir(20)) == states


@pytest.mark.parametrize(("source", "target"), [(("single", 1), ("zero2", 2)), _slow(("zero2", 2), ("ddp", 2))])
def test_adafactor_is_refused_where_its_state_means_something_else(
    lab: Lab, tmp_path: Path, source: Size, target: Size
) -> None:
    reference = Reference(lab, (*_NO_DROPOUT, *_ADAFACTOR))
    start(reference.run(source), tmp_path / "run")
    codes = lab.run_codes(tmp_path / "run", *target, *reference.extra)
    assert set(codes) & {2} and set(codes) <= {2, -9}
    assert "can only continue under the partition" in log_text(tmp_path / "run")


@pytest.mark.parametrize(("source", "target"), [(("zero2", 2), ("zero3", 3)), _slow(("zero3", 2), ("ddp", 2))])
def test_masters_continue_when_the_forward_pass_is_bfloat16(
    lab: Lab, tmp_path: Path, source: Size, target: Size
) -> None:
    """bf16 rounds every forward pass, so losses are close only; the fp32 masters are what was stored, bit for bit."""
    reference = Reference(lab, (*_NO_DROPOUT, *_BFLOAT16))
    found = reference.continued(source, target, tmp_path / "run")
    check_losses(reference.run(source), found, relative=3e-2, first=5e-3)
    assert _stored_states(found.checkpoint_dir(20)) == {"master", "exp_avg", "exp_avg_sq"}
    stored = tensors(found.checkpoint_dir(20))
    assert all(v.dtype == torch.float32 for k, v in stored.items() if k.startswith("optimizer "))


def test_lora_continues_and_its_checkpoints_load(lab: Lab, tmp_path: Path) -> None:
    """The base model is one of its own here: an adapter without it cannot be loaded."""
    base = reference_model(lab)
    settings = ("model=pretrained", f"model.model_name_or_path={base}", *_LORA)
    reference = Reference(lab, (*settings, "model.peft.target_modules=all-linear"))
    found = reference.continued(("zero2", 2), ("ddp", 3), tmp_path / "run")
    a, b = losses(reference.run(("zero2", 2))), losses(found)
    assert max(abs(a[k] - b[k]) / a[k] for k in range(11, 21)) <= 1e-4
    adapter = tensors(found.checkpoint_dir(20))
    assert all(bool(v.any()) for k, v in adapter.items() if "lora_B" in k), "the adapter was not trained"
    for folder in (found.checkpoint_dir(20), found.root):
        names = {p.name for p in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
        check_generates(folder)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_every_checkpoint_and_output_dir_load_and_generate(lab: Lab, reference: Reference, strategy: str) -> None:
    run = reference.run((strategy, 2))
    for folder in (run.checkpoint_dir(10), run.checkpoint_dir(20), run.root):
        check_generates(folder)


def reference_model(lab: Lab) -> Path:
    """A model folder to fine-tune."""
    folder = lab.folder / "base"
    if not folder.exists():
        run = Reference(lab).run(("single", 1))
        shutil.copytree(run.checkpoint_dir(20), folder, ignore=shutil.ignore_patterns("state", "manifest.json"))
    return folder


def check_generates(folder: Path) -> None:
    """What a user does with a result."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "red dog"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
