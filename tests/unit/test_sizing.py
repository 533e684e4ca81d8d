"""`auto`: the simplest strategy that fits, the largest micro-batch, and the same again at a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launcher.base.errors import ConfigError, UserError
from launcher.base.processes import Processes
from launcher.base.words import size as size_text
from launcher.config.compose import compose
from launcher.config.settings import RunConfig, to_dict
from launcher.data import build_tokenizer
from launcher.model.memory import devices, plan
from launcher.model.memory.devices import Device
from launcher.model.memory.plan import MemoryModel
from launcher.train import sizing

_AUTO = (
    "strategy=auto",
    "model=tiny_llama",
    "data=arithmetic",
    "model.config.hidden_size=512",
    "train.train_batch_size=32",
)


def settled(
    monkeypatch: pytest.MonkeyPatch, num_processes: int, num_bytes: float, *overrides: str, kind: str = "cuda"
) -> RunConfig:
    return settled_and_told(monkeypatch, num_processes, num_bytes, *overrides, kind=kind)[0]


def settled_and_told(
    monkeypatch: pytest.MonkeyPatch, num_processes: int, num_bytes: float, *overrides: str, kind: str = "cuda"
) -> tuple[RunConfig, list[str]]:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    monkeypatch.setattr(devices, "find_device", lambda *_: Device(kind, int(num_bytes), "as the test says"))
    monkeypatch.setattr(sizing, "ask_main", lambda device, decide: decide([device]))
    return sizing.settle(compose([*_AUTO, *overrides]))


def memory_of(config: RunConfig, num_processes: int) -> MemoryModel:
    return MemoryModel(config, Device("cuda", 10**12, "big"), num_processes, build_tokenizer(config))


def device_bytes(needed: float) -> float:
    """Of a device on which just so much fits."""
    return (needed * 1.0001 + 800e6) / 0.94


@pytest.mark.parametrize(("num_processes", "expected"), [(1, "single"), (2, "ddp"), (3, "ddp"), (4, "ddp")])
def test_simplest_strategy_is_chosen_when_all_fit(
    num_processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (notice,) = settled_and_told(monkeypatch, num_processes, 80e9)
    assert config.strategy.name == expected and config.train.per_device_train_batch_size == 8
    assert notice.startswith(f"strategy={expected}, 8 samples")


def test_less_memory_leads_to_more_partitioning(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*_AUTO, "model.dtype=bfloat16"])
    memory = memory_of(config, 4)
    needs = {name: memory.plan(name).parts.total for name in memory.strategies()}
    for name, needed in needs.items():
        simpler = [other for other in list(needs)[: list(needs).index(name)] if needs[other] <= needed]
        chosen = settled(monkeypatch, 4, device_bytes(needed), "model.dtype=bfloat16").strategy.name
        assert chosen == (simpler[0] if simpler else name)


@pytest.mark.parametrize(
    ("host_bytes", "num_machines", "is_enough"), [(10**12, 1, True), (40_000_000, 1, False), (40_000_000, 2, True)]
)
def test_decision_says_what_the_host_must_hold(
    monkeypatch: pytest.MonkeyPatch, host_bytes: int, num_machines: int, is_enough: bool
) -> None:
    asked = ("strategy=zero3_offload", "model.dtype=bfloat16", "train.per_device_train_batch_size=auto")
    needed = memory_of(compose([*_AUTO, *asked]), 4).offloaded_bytes("zero3_offload") * 4 // num_machines
    monkeypatch.setattr(sizing, "host_bytes", lambda: host_bytes)
    machines = [f"launch.num_machines={num_machines}", "launch.main_process_ip=10.0.0.1"] if num_machines > 1 else []
    _, (notice,) = settled_and_told(monkeypatch, 4, 80e9, *asked, *machines)
    assert f", and {size_text(needed)} of {size_text(host_bytes)} host memory" in notice
    assert ("This host does not have that" in notice) is not is_enough
    assert "host" not in settled_and_told(monkeypatch, 4, 80e9)[1][0]


def test_largest_micro_batch_is_found_and_never_exceeds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    open_batch = "train.per_device_train_batch_size=auto"
    assert settled(monkeypatch, 2, 80e9, open_batch).train.per_device_train_batch_size == 16
    memory = memory_of(compose([*_AUTO, open_batch]), 1)
    for size in (1, 3, 20):
        needed = memory.parts("single", size).total
        found = settled(monkeypatch, 1, device_bytes(needed), open_batch).train.per_device_train_batch_size
        assert found == size


def test_plan_does_not_depend_on_what_was_asked_before() -> None:
    config = compose([*_AUTO, "train.per_device_train_batch_size=auto"])
    first, second = memory_of(config, 1), memory_of(config, 1)
    rising = {size: first.parts("single", size) for size in (1, 2, 15, 16, 17, 32)}
    assert rising == {size: second.parts("single", size) for size in (32, 2, 17, 1, 16, 15)}


@pytest.mark.parametrize(("num_processes", "expected"), [(1, "single"), (2, "ddp"), (3, "ddp")])
def test_default_is_the_simplest_strategy_on_a_cpu_and_asks_no_model(
    num_processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RunConfig().strategy.name == "auto"
    monkeypatch.setattr(plan, "MemoryModel", None)
    config, notices = settled_and_told(monkeypatch, num_processes, 10, kind="cpu")
    assert config.strategy.name == expected and not notices


def test_smallest_device_decides_for_all() -> None:
    config = compose([*_AUTO, "train.per_device_train_batch_size=auto"])
    needed = memory_of(config, 2).parts("ddp", 3).total
    devices = [Device("cuda", int(80e9), "here"), Device("cuda", int(device_bytes(needed)), "there")]
    assert sizing.decide(config, 2, devices[:1] * 2).train == 16
    assert sizing.decide(config, 2, devices).train == 3


def test_model_that_cannot_be_planned_gets_the_simplest_strategy_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("it cannot be planned")

    monkeypatch.setattr(plan, "MemoryModel", refuse)
    config, notices = settled_and_told(monkeypatch, 2, 80e9)
    assert config.strategy.name == "ddp" and notices == ["strategy=ddp, the simplest: it cannot be planned"]
    with pytest.raises(UserError):
        settled(monkeypatch, 2, 80e9, "train.per_device_train_batch_size=auto")


def test_run_keeps_its_strategy_when_it_goes_on_with_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(compose([*_AUTO[1:], "strategy=zero2"]))))
    (tmp_path / "run.json").write_text(json.dumps({"world_size": 2}))
    assert settled(monkeypatch, 2, 80e9, f"output_dir={tmp_path}").strategy.name == "zero2"
    assert settled(monkeypatch, 3, 80e9, f"output_dir={tmp_path}").strategy.name == "ddp"
    for odd in ("[1]", "strategy: 3", "strategy: {name: [auto]}", "\x00"):
        (tmp_path / "config.yaml").write_text(odd)
        assert settled(monkeypatch, 2, 80e9, f"output_dir={tmp_path}").strategy.name == "ddp"


def test_processes_that_chose_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    monkeypatch.setattr(processes, "gather", lambda value: [value, ("zero3", 4)])
    with pytest.raises(UserError, match=r"rank 0: ddp, 8; rank 1: zero3, 4"):
        sizing.check_agreement(compose([*_AUTO[1:], "strategy=ddp"]), processes)


def test_another_word_than_auto_is_refused() -> None:
    with pytest.raises(ConfigError, match="per_device_train_batch_size"):
        compose([*_AUTO, "train.per_device_train_batch_size=big"])
