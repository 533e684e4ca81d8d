"""`launcher doctor`: what is wrong with a machine is named, with the command that mends it, before a run meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.agent.command import free_port
from launcher.cli.doctor import services
from tests.hub.helpers import hub_environment
from tests.hub.server import HubServer

_COMMAND = (sys.executable, "-m", "launcher.cli", "doctor")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def examine(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """The exit code, and the findings by name."""
    capsys.readouterr()
    code = cli.main(["doctor", "--json", *overrides])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in told["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    return code, found


def statuses(found: dict[str, list[dict[str, str]]], name: str) -> set[str]:
    return {finding["status"] for finding in found[name]}


def test_doctor_finds_nothing_when_all_is_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found = examine(capsys, "strategy=zero2")
    assert code == 0
    for name in ("python", "packages", "torch", "memory", "compiler", "operators", "output_dir", "disk", "network"):
        assert statuses(found, name) == {"ok"}, found[name]
    assert not any((tmp_path / name).exists() for name in ("outputs", "cache"))  # it leaves nothing


def test_doctor_names_every_fault_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    code, found = examine(
        capsys, "output_dir=/proc/runs", "strategy=zero3", "hub.push_to_hub=true", "launch.num_machines=2",
        "launch.num_processes=2",
    )  # fmt: skip
    assert code == 1
    for name in ("compiler", "output_dir", "network", "hub"):
        assert "error" in statuses(found, name), found[name]
    assert "nope0" in found["network"][0]["text"] and "lo" in found["network"][0]["text"]
    assert "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in found["environment"][0]["fix"]
    assert "launch.machine_rank" in found["machines"][0]["fix"]


def test_doctor_fix_removes_the_lock_of_a_killed_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock = tmp_path / "extensions" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parents[1]))
    from launcher.cli.doctor import devices

    devices._ask_torch.cache_clear()
    code, found = examine(capsys)
    assert (code, statuses(found, "operators")) == (0, {"warning"}) and str(lock) in found["operators"][0]["text"]
    assert "--fix" in found["operators"][0]["fix"] and lock.exists()
    _, found = examine(capsys, "--fix")
    assert statuses(found, "operators") == {"ok"} and not lock.exists()
    devices._ask_torch.cache_clear()


def test_doctor_asks_the_hub_who_we_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer(tmp_path / "server") as hub:
        answers = {}
        for token in (hub_environment(hub.url, tmp_path / "home", xet=False)["HF_TOKEN"], "hf_wrong" + "0" * 20, None):
            env = {**os.environ, **hub_environment(hub.url, tmp_path / "home", xet=False)}
            env.pop("HF_HUB_OFFLINE", None)
            env = {**env, "HF_TOKEN": token} if token else {k: v for k, v in env.items() if k != "HF_TOKEN"}
            code = "from launcher.hub import login_state as ask; s = ask(); print(s.user, '|', s.problem, '|', s.fix)"
            answers[token] = subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=240
            ).stdout.strip()
    right, wrong, nobody = answers.values()
    assert right.endswith("| None | None") and not right.startswith("None")
    assert "token is refused" in wrong and "hf auth login" in wrong and "hf_wrong" not in wrong
    assert "nobody is logged in" in nobody


@pytest.mark.parametrize("address", ["127.0.0.1:9", "hub.invalid"])
def test_doctor_shows_no_password_of_the_endpoint(address: str, tmp_path: Path) -> None:
    """Promise 6: what it says goes into a report of a problem."""
    env = {**os.environ, "HF_ENDPOINT": f"http://me:hunter2hunter2@{address}", "HF_HOME": str(tmp_path)}
    for offline in ("0", "1"):
        code = "from launcher.hub import login_state as ask; print(ask())"
        shown = subprocess.run(
            [sys.executable, "-c", code], env={**env, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True,
            check=True, timeout=240,
        ).stdout  # fmt: skip
        assert address in shown and "hunter2" not in shown


def test_doctor_says_what_the_file_system_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(services.os, "link", refuse)
    monkeypatch.setattr(services.fcntl, "flock", refuse)
    code, found = examine(capsys)
    assert code == 0 and "no hard links" in found["output_dir"][1]["text"] and "flock" in found["output_dir"][2]["text"]


@pytest.mark.parametrize("is_shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_doctor_compares_the_machines_of_a_run(is_shared: bool, tmp_path: Path) -> None:
    port, started = free_port(), []
    for rank in range(3):
        folder = tmp_path / ("run" if is_shared else f"run-{rank}")
        started.append(
            subprocess.Popen(
                [*_COMMAND, "--json", f"output_dir={folder}", "launch.num_machines=3", f"launch.machine_rank={rank}",
                 "launch.num_processes=3", "launch.main_process_ip=127.0.0.1", f"launch.main_process_port={port}"],
                stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in started:
        told = {finding["name"]: finding for finding in json.loads(process.communicate(timeout=180)[0])["findings"]}
        assert told["machines"]["status"] == told["clocks"]["status"] == "ok"
        assert told["shared folder"]["status"] == ("ok" if is_shared else "error")
        assert process.returncode == (0 if is_shared else 1)
    assert not list(tmp_path.glob("run*"))


def test_processes_that_cannot_meet_are_named_at_once(tmp_path: Path) -> None:
    """Without a loopback interface they would wait for each other for minutes."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network of its own can only be made as root")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    alone, told = ["unshare", "--net", sys.executable, "-m"], {"capture_output": True, "text": True}
    where = [f"output_dir={tmp_path / 'run'}", f"data.train_files=[{tmp_path / 'rows.jsonl'}]"]
    for how in (
        ["launcher.cli", "train", "launch.num_processes=2"],
        ["launcher.cli", "train", "launch.num_processes=1", "strategy=zero2"],
        ["launcher.train", "strategy=zero2"],  # as a rank does whose strategy=auto became ZeRO
    ):
        done = subprocess.run([*alone, *how, *where], timeout=240, check=False, **told)  # type: ignore[call-overload]
        assert done.returncode == 2 and "ip link set lo up" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    doctor = [*alone, "launcher.cli", "doctor", "--json"]
    found = subprocess.run(doctor, timeout=240, check=False, **told)  # type: ignore[call-overload]
    fixes = [finding["fix"] for finding in json.loads(found.stdout)["findings"] if finding["name"] == "network"]
    assert fixes[0] == "ip link set lo up"
