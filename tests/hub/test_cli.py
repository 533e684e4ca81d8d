"""`launcher push` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base.errors import UserError
from launcher.cli import prefetch, push
from launcher.cli.checkpoints import list_checkpoints
from launcher.hub.items import Item, checkpoint_item, model_item
from launcher.hub.push import Plan, as_data, plan_push
from launcher.hub.push import push as push_plan
from launcher.hub.spool import Spool
from launcher.sweep.runs import read_run
from tests.hub.helpers import (
    REPO,
    UploaderUnderTest,
    make_checkpoint,
    make_config,
    prepare_spool,
    wait_until,
    write_model,
)
from tests.hub.server import HubServer

_MAIN = """
import sys
from launcher.cli import push
from launcher.base.errors import LauncherError
try:
    code = push.main(sys.argv[1:])
except LauncherError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
assert "torch" not in sys.modules
sys.exit(code)
"""


def launcher_push(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", _MAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **env}, timeout=180)


def test_pending_uploads_are_sent(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints"))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    done = launcher_push(env, str(run))
    assert done.returncode == 0, done.stderr
    assert "checkpoint-10 is at org/model" in done.stdout and "checkpoint-20 is at org/model" in done.stdout
    assert set(hub.repos[REPO].tags) == {"step-10", "step-20"}
    assert spool.pending() == []


def test_checkpoint_is_pushed_by_hand(hub: HubServer, env_of: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(run)
    config.hub.push_to_hub = False
    checkpoint = make_checkpoint(run, 10)
    arguments = [str(checkpoint), "--repo-id", "me/other", "--private", "--revision", "dev"]
    done = launcher_push(env_of, *arguments)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/other"]
    assert repo.private
    assert {"model.safetensors", "last-checkpoint/manifest.json", "README.md"} <= set(repo.resolve("dev").files)
    assert checkpoint.is_dir() and not (run / ".hub").exists()
    again = launcher_push(env_of, *arguments)
    assert again.returncode == 0
    assert hub.count("POST .*/commit/") == 1


def test_final_model_is_pushed_when_nothing_is_pending(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_config(run)
    write_model(run, 7)
    done = launcher_push(env, str(run))
    assert done.returncode == 0, done.stderr
    assert hub.read(REPO, "model.safetensors") == (run / "model.safetensors").read_bytes()


def test_pull_request_is_opened_once_when_the_reply_is_lost(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_config(run)
    write_model(run, 7)
    hub.fail("POST .*/commit/", lose_reply=True)
    done = launcher_push(env, str(run), "--create-pr")
    assert done.returncode == 0, done.stderr
    assert list(hub.repos[REPO].pull_requests) == ["refs/pr/1"]
    assert "model.safetensors" not in hub.repos[REPO].files


def test_wrong_token_fails_with_the_cure(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_config(run)
    write_model(run, 7)
    hub.tokens.clear()
    done = launcher_push(env, str(run))
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert env["HF_TOKEN"] not in done.stderr + done.stdout


def test_running_uploader_is_left_alone_and_followed(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    fault = hub.fail("POST .*/commit/", status=503, times=None)
    with UploaderUnderTest(spool, env):
        wait_until(lambda: fault.hits)
        done = launcher_push(env, str(run))
        assert done.returncode == 0 and "the run itself is sending this now" in done.stdout
        hub.heal()
        done = launcher_push(env, str(run), "--follow")
    assert done.returncode == 0
    assert "model.safetensors" in hub.repos[REPO].files


@pytest.mark.parametrize("is_claimed", [False, True])
def test_plan_is_made_when_the_runs_own_uploader_takes_what_is_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_claimed: bool
) -> None:
    """It claims an item, or is done with it and with all others, between the look into the queue and at the item."""
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    read, reads = Spool.read_item, []

    def taken(self: Spool, home: Path) -> Item:
        reads.append(home)
        if len(reads) == 1 and is_claimed:
            spool.claim()
        elif len(reads) == 1:
            for item in spool.claim(2):
                spool.discard(item.home)
        return read(self, home)

    monkeypatch.setattr(Spool, "read_item", taken)
    plan = plan_push(run, {})
    assert [item.name for item in plan.items] == (["checkpoint-10", "checkpoint-20"] if is_claimed else [])
    assert is_claimed or push_plan(plan, follow=True) == ["sent by the run itself, just now"]
    assert is_claimed or as_data(plan)["bytes"] == 0


def test_item_that_was_sent_meanwhile_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    plan = plan_push(run, {})
    spool.discard(plan.items[0].home)
    Plan(plan.settings, plan.items, plan.spool)


def test_dry_run_lists_files_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    make_config(run)
    checkpoint = make_checkpoint(run, 10)
    assert push.main([str(checkpoint), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size:>15,}  model.safetensors" in lines
    assert f"{size:>15,}  last-checkpoint/model.safetensors" in lines
    assert REPO in lines[-1]


def test_input_is_refused_when_there_is_nothing_to_push(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        push.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="no model of ours"):
        push.main([str(tmp_path)])
    write_model(tmp_path, 1)
    with pytest.raises(UserError, match="--repo-id ORG/NAME"):
        push.main([str(tmp_path), "--dry-run"])


@pytest.mark.parametrize("verb", [push, prefetch])
def test_help_holds_an_example(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verb.main(["--help"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"launcher {verb.__name__.rpartition('.')[2]} " in text  # type: ignore[attr-defined]
    assert "example" in text


def test_nothing_is_committed_when_everything_is_there(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    write_model(run, 10)
    spool.add(model_item(run, None))
    assert launcher_push(env, str(run)).returncode == 0
    commits = hub.count("POST .*/commit/")
    done = launcher_push(env, str(run))
    assert done.returncode == 0, done.stderr
    assert hub.count("POST .*/commit/") == commits


def test_what_was_pushed_by_hand_is_shown_as_on_the_hub(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    told = {"pushed": [], "pending": spool.pending(), "last_error": "it is down", "command": f"launcher push {run}"}
    (run / "run.json").write_text(json.dumps({"state": "finished", "hub": told}))
    assert [row["on_hub"] for row in list_checkpoints(run)] == [False]
    assert launcher_push(env, str(run)).returncode == 0
    assert [row["on_hub"] for row in list_checkpoints(run)] == [True]
    shown = read_run(run, None).hub
    assert shown == {"pushed": ["checkpoint-10"], "pending": [], "last_error": None, "command": None}
