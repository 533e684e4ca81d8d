"""What `launcher plan` says beforehand, against real runs: bytes of checkpoints, and the most memory at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base.paths import RunPaths
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.data import build_tokenizer
from launcher.model.memory.devices import Device
from launcher.model.memory.plan import MemoryModel
from launcher.saving.checkpoint_size import CheckpointSize, checkpoint_size
from tests.distributed.runs import Lab
from tests.distributed.zygote import Zygote

_SOURCE = Path(__file__).with_name("allocations.c")
_HOST = Device("cpu", 16 * 10**9, "a test's")


def _memory(overrides: list[str], num_processes: int) -> tuple[RunConfig, MemoryModel]:
    config = compose(overrides)
    return config, MemoryModel(config, _HOST, num_processes, build_tokenizer(config))


def _planned(overrides: list[str], num_processes: int) -> CheckpointSize:
    config, memory = _memory(overrides, num_processes)
    stage = config.strategy.zero_stage
    return checkpoint_size(config, memory.model, memory.states, zero_stage=stage, num_processes=num_processes)


_WIDE = ("model.config.hidden_size=256", "model.config.intermediate_size=704", "model.config.num_hidden_layers=3")


@pytest.mark.parametrize(
    ("strategy", "num_processes", "more"),
    [
        ("single", 1, ("model.dtype=bfloat16",)),
        ("zero3", 2, ("model.dtype=bfloat16",)),
        ("zero2", 2, ("model/peft=lora", "model.peft.r=64")),
        pytest.param("ddp", 2, (), marks=pytest.mark.slow),
        pytest.param("zero1", 2, ("model.dtype=bfloat16",), marks=pytest.mark.slow),
        pytest.param("zero3", 3, (), marks=pytest.mark.slow),
        pytest.param("single", 1, ("optim=adafactor",), marks=pytest.mark.slow),
        pytest.param("single", 1, ("optim=sgd", "checkpoint.save_only_model=true"), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_as_large_as_planned_when_it_is_saved(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int, more: tuple[str, ...]
) -> None:
    steps = ("train.max_steps=1", "checkpoint.save_steps=1")
    run: RunPaths = lab.run(tmp_path, strategy, num_processes, *_WIDE, *steps, *more)
    planned = _planned(lab.overrides(tmp_path, strategy, *_WIDE, *steps, *more), num_processes)
    sizes = {p.relative_to(run.root / "checkpoint-1"): p.stat().st_size for p in run.checkpoint_dir(1).rglob("*")
             if p.is_file()}  # fmt: skip
    model = sum(n for path, n in sizes.items() if path.name.endswith("model.safetensors"))
    state = sum(n for path, n in sizes.items() if path.parts[0] == "state")
    assert planned.model == pytest.approx(model, rel=0.01)
    assert planned.state == pytest.approx(state, rel=0.01, abs=1)
    assert planned.total == pytest.approx(sum(sizes.values()), rel=0.01)


@pytest.mark.parametrize("is_small", [False, True])
def test_a_run_tells_how_far_its_plan_was_off_when_it_ends(lab: Lab, tmp_path: Path, is_small: bool) -> None:
    """Of a process that holds little but the libraries, only how large its checkpoint is."""
    steps = ("train.max_steps=2", "optim.name=tests.distributed.measured.ToldAdamW")
    env = {"LEAST_SHARE": "0.5" if is_small else "0"}
    run = lab.run(tmp_path, "zero2", 2, *_WIDE, *steps, "model.dtype=bfloat16", env=env)
    told = json.loads(run.run_state.read_text())["planned_and_measured"]
    planned, measured = told["checkpoint_bytes"]
    assert planned == pytest.approx(measured, rel=0.01)
    text = (tmp_path / "test.log").read_text()
    if is_small:
        assert "memory_bytes" not in told and "plan: checkpoint" in text
        return
    assert all(10**8 < number < 10**10 for number in told["memory_bytes"])
    assert "plan: memory of a process" in text


_LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.slow
def test_a_plan_takes_seconds_and_little_memory_when_the_model_has_70_billion_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA_70B))
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "plan", f"model.model_name_or_path={tmp_path}", "model.dtype=bfloat16",
         "data.max_length=4096", "launch.num_processes=64", "--device-memory", "80GB"],
        cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_maxrss * 1024 < 2 * 10**9
    assert used.ru_utime + used.ru_stime < 8, "5 s of CPU time on a quiet machine"


# --------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Ranks whose allocations are counted; MKL keeps as much packed as on any processor."""
    folder = tmp_path_factory.mktemp("counting")
    library = folder / "allocations.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("MKL_CBWR", "AVX2")
        zygote = Zygote(folder / "log")
    yield zygote
    zygote.close()


def _rows(path: Path) -> None:
    """All are too long: a plan counts full rows, and micro-batches without padding hold no more than there is."""
    lines = [json.dumps({"text": "x" * 600})] * 64
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _overrides(folder: Path, strategy: str, *more: str) -> list[str]:
    model = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 8192}  # fmt: skip
    return [
        f"data.train_files=[{folder}/rows.jsonl]", f"data.cache_dir={folder}/cache", "data.max_length=512",
        "model=tiny_llama", *(f"model.config.{key}={value}" for key, value in model.items()), "tracker=off",
        "train.per_device_train_batch_size=4", "train.max_steps=3", "train.logging_steps=1", "checkpoint=off",
        "optim.name=tests.distributed.measured.MeasuredAdamW", f"output_dir={folder}/run",
        f"strategy={strategy}", *more,
    ]  # fmt: skip


_LORA = ("model/peft=lora", "model.peft.r=16", "model.peft.target_modules=all-linear")
_SMALL_BUCKET = "strategy.deepspeed.zero_optimization.reduce_bucket_size=4000000"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "num_processes", "more"),
    [
        ("single", 1, ("train.train_batch_size=4",)),
        ("single", 1, ("train.train_batch_size=8", "model.gradient_checkpointing=true")),
        ("ddp", 2, ("train.train_batch_size=8",)),
        ("zero2", 2, ("train.train_batch_size=8", _SMALL_BUCKET)),
        ("zero2", 2, ("train.train_batch_size=16", _SMALL_BUCKET)),
        ("zero2", 3, ("train.train_batch_size=24", _SMALL_BUCKET)),
        ("zero3", 2, ("train.train_batch_size=16", _SMALL_BUCKET)),
        ("zero3", 2, ("train.train_batch_size=16", _SMALL_BUCKET, *_LORA)),
        ("zero3", 2, ("train.train_batch_size=16", _SMALL_BUCKET, *_LORA, "model.config.vocab_size=32000")),
        ("zero2", 2, ("train.train_batch_size=16", _SMALL_BUCKET, *_LORA)),
    ],
)
def test_memory_is_as_planned_when_a_run_is_measured(
    counting: Zygote, tmp_path: Path, strategy: str, num_processes: int, more: tuple[str, ...]
) -> None:
    _rows(tmp_path / "rows.jsonl")
    overrides = _overrides(tmp_path, strategy, *more)
    counting.start(overrides, num_processes, tmp_path / "log", {"MEASURED_DIR": str(tmp_path)})
    assert counting.wait() == [0] * num_processes, (tmp_path / "log").read_text(errors="replace")[-3000:]
    _, memory = _memory(overrides, num_processes)
    planned = memory.parts(strategy, 4).total
    peaks = [json.loads(path.read_text().splitlines()[-1])["peak"] for path in sorted(tmp_path.glob("rank-*.jsonl"))]
    assert len(peaks) == num_processes
    assert planned == pytest.approx(max(peaks), rel=0.05), "of the device that holds most: under ZeRO-2 the last one"
