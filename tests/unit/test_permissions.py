"""What is told of places that are another user's, and where there is no home: one line, before anything begins."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launcher import cli
from launcher.agent.attempt import Attempt
from launcher.agent.machine import OneMachine, Start
from launcher.agent.requests import Requests
from launcher.base._deepspeed import build_cpu_collectives
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths, default_cache_dir
from launcher.cli import status
from launcher.config.settings import RunConfig
from tests.unprivileged import drop_privileges, without_privileges


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that nobody may enter."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    return folder


def test_closed_data_and_model_are_named_together_when_settings_are_read(tmp_path: Path, closed: Path) -> None:
    files = [tmp_path / name for name in ("open.jsonl", "mine.jsonl")]
    for path in files:
        path.write_text('{"text": "one"}\n')
    files[1].chmod(0)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "tokenizer.json").touch(mode=0)
    names = [f"model.model_name_or_path={closed}/model", f"model.tokenizer_name_or_path={tokenizer}"]
    command = [sys.executable, "-m", "launcher.cli", "train", "--cfg", "job"]
    done = subprocess.run(
        [*command, f"data.train_files=[{files[0]},{files[1]}]", *names], capture_output=True, text=True, timeout=60,
        preexec_fn=drop_privileges, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "3 settings are wrong" in done.stderr
    assert f"data.train_files: {files[1]} may not be used by this user (uid {os.getuid()})" in done.stderr
    assert f"model.model_name_or_path: {closed}/model/config.json may not be used" in done.stderr
    assert f"model.tokenizer_name_or_path: {tokenizer}/tokenizer.json may not be used" in done.stderr


def test_run_of_another_user_is_refused_with_the_way_to_go_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir(mode=0)
    with without_privileges(), pytest.raises(UserError) as caught:
        RunPaths(tmp_path).refuse_links()
    assert f"output_dir={tmp_path}: {tmp_path}/logs/" in str(caught.value)
    assert f"checkpoint.resume_from_checkpoint={tmp_path}/checkpoint-N" in str(caught.value)


@pytest.mark.parametrize("verb", ["status", "checkpoints", "verify", "report"])
def test_closed_folder_is_named_in_one_line(closed: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with without_privileges():
        assert cli.main([verb, str(closed)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(closed) in told and "may not be used by this user" in told


def test_missing_home_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match=r"Set data\.cache_dir=FOLDER"):
        default_cache_dir()


def test_missing_place_for_temporary_files_is_named_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    config = RunConfig(output_dir=str(tmp_path / "run"))
    attempt = Attempt(config, RunPaths(tmp_path / "run"), [])
    ended = attempt.run(Start(0, "a", 1, is_restart=False), OneMachine(Requests(), lambda: None), 0.0)
    assert ended.code == 2 and "Set TMPDIR=FOLDER" in ended.reports[0]["message"]


def test_missing_place_for_operators_is_named_with_the_variable(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(closed / "operators"))
    with without_privileges(), pytest.raises(UserError, match="Set TORCH_EXTENSIONS_DIR=FOLDER"):
        build_cpu_collectives()


def test_refusal_that_names_no_place_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: list[str]) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(status, "main", refused)
    assert cli.main(["status"]) == 1
    assert "unexpected PermissionError" in capsys.readouterr().err
