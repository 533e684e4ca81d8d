"""Promise 5: whatever the Hub does, everything arrives later, once, or is named with its cure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.command import free_port
from launcher.hub.items import checkpoint_item
from launcher.hub.spool import Spool
from tests.hub.helpers import (
    REPO,
    UploaderUnderTest,
    hub_environment,
    make_checkpoint,
    make_config,
    prepare_spool,
    upload_all,
    wait_until,
)
from tests.hub.server import READ_TOKEN, WRITE_TOKEN, HubServer

COMMIT = r"POST /api/models/.*/commit/"


def spool_with_checkpoint(tmp_path: Path, strategy: str = "checkpoint", **settings: Any) -> Spool:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy=strategy), **settings)
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    return spool


def told(spool: Spool) -> list[str]:
    if not spool.events_path.exists():
        return []
    return [json.loads(line)["text"] for line in spool.events_path.read_text().splitlines()]


def assert_arrived_once(hub: HubServer, tmp_path: Path) -> None:
    assert [c.title for c in hub.repos[REPO].history()] == ["Push checkpoint-10", "initial commit"]
    for path in (tmp_path / "run" / "checkpoint-10").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "run" / "checkpoint-10")
            assert hub.read(REPO, f"last-checkpoint/{name}") == path.read_bytes()


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            [{"match": "repos/create", "status": 503}, {"match": COMMIT, "status": 502, "times": 3}], id="5xx"
        ),
        pytest.param([{"match": COMMIT, "status": 429, "retry_after": 1}], id="429"),
        pytest.param([{"match": "GET /api/models", "reset": True}, {"match": COMMIT, "reset": True}], id="reset"),
        pytest.param([{"match": COMMIT, "hang": 4.0}], id="hang"),
        pytest.param([{"match": COMMIT, "lose_reply": True}], id="lost_reply"),
        pytest.param([{"match": "validate-yaml", "status": 500}, {"match": "tree", "status": 504}], id="others"),
    ],
)
def test_arrives_once_when_fault_passes(
    hub: HubServer, env: dict[str, str], tmp_path: Path, faults: list[dict[str, Any]]
) -> None:
    spool = spool_with_checkpoint(tmp_path, timeout_s=1.0)
    for fault in faults:
        hub.fail(**fault)
    upload_all(spool, env)
    assert all(fault.hits for fault in hub.faults)
    assert_arrived_once(hub, tmp_path)


def test_arrives_once_over_xet_when_everything_fails_once(
    hub: HubServer, xet_env: dict[str, str], tmp_path: Path
) -> None:
    spool = spool_with_checkpoint(tmp_path, timeout_s=1.0)
    hub.fail("repos/create", status=503)
    hub.fail("xet-write-token", status=500)
    hub.fail("xet-write-token", reset=True)
    hub.fail("preupload", reset=True)
    hub.fail(COMMIT, status=502)
    hub.fail(COMMIT, status=429, retry_after=1)
    hub.fail(COMMIT, hang=4.0)
    hub.fail(COMMIT, lose_reply=True)
    upload_all(spool, xet_env)
    assert all(fault.hits for fault in hub.faults)
    assert_arrived_once(hub, tmp_path)


def test_arrives_once_when_upload_is_cut_in_the_middle(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path, timeout_s=1.0)
    hub.fail("PUT /__lfs", reset=True, times=2)
    hub.fail("PUT /__lfs", hang=3.0, times=1)
    hub.fail("PUT /__lfs", status=500, times=1)
    upload_all(spool, env)
    assert_arrived_once(hub, tmp_path)


def test_arrives_when_server_comes_up_late(env: dict[str, str], tmp_path: Path) -> None:
    port, spool = free_port(), spool_with_checkpoint(tmp_path)
    with UploaderUnderTest(spool, {**env, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}):
        wait_until(lambda: spool.read_status().get("state") == "waiting", message="it did not notice the outage")
        assert len(told(spool)) == 1 and "will be tried until it works" in told(spool)[0]
        time.sleep(1.0)
        assert len(told(spool)) == 1  # told once, not at every try
        with HubServer(tmp_path / "late", port) as late:
            wait_until(lambda: not spool.pending())
            assert_arrived_once(late, tmp_path)


def test_retry_after_is_obeyed_when_it_is_long(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    hub.fail(COMMIT, status=429, retry_after=3600, times=None)
    with UploaderUnderTest(spool, env):
        wait_until(lambda: spool.read_status().get("state") == "waiting")
        time.sleep(1.5)
        assert hub.faults[0].hits == 1
        assert "429" in spool.read_status()["last_error"]


def test_the_other_ones_commit_stays_when_head_moves(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    fault = hub.fail(COMMIT, hang=0.0, times=1)  # the first try is cut; meanwhile somebody commits
    with UploaderUnderTest(spool, env):
        wait_until(lambda: fault.hits)
        repo = hub.repos[REPO]
        files = {**repo.files, "notes.json": repo.files[".gitattributes"]}
        repo.add_commit(repo.branches, "main", "by the user", files, repo.branches["main"])
        wait_until(lambda: not spool.pending())
    assert "notes.json" in repo.files and "last-checkpoint/manifest.json" in repo.files
    assert hub.count(COMMIT) <= 2


def test_conflict_is_resolved_when_server_says_412(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    hub.fail(COMMIT, status=412, times=2)
    upload_all(spool, env)
    assert_arrived_once(hub, tmp_path)


@pytest.mark.parametrize("xet", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "token", "cure"),
    [
        ({"status": 401, "message": "Invalid credentials in Authorization header"}, WRITE_TOKEN, "hf auth login"),
        (None, READ_TOKEN, "write access"),
        ({"status": 403, "message": "Private repository storage limit reached, please upgrade"}, WRITE_TOKEN, "quota"),
        ({"status": 404, "code": "RepoNotFound", "message": "Repository not found"}, WRITE_TOKEN, "deleted or renamed"),
    ],
)
def test_permanent_fault_is_told_once_with_its_cure(
    hub: HubServer, tmp_path: Path, fault: dict[str, Any] | None, token: str, cure: str, xet: bool
) -> None:
    spool = spool_with_checkpoint(tmp_path)
    if fault is not None:
        hub.fail(COMMIT, times=None, **fault)
    env = hub_environment(hub.url, tmp_path / "home", xet=xet, token=token)
    with UploaderUnderTest(spool, env) as uploader:
        wait_until(lambda: spool.read_status().get("state") == "blocked")
        time.sleep(0.7)
        assert [cure in text for text in told(spool)] == [True]
        assert cure in spool.read_status()["last_error"]
        assert spool.pending() == ["checkpoint-10"]
        hub.heal()
        hub.tokens[token] = "write"
        assert uploader.process.stdin is not None
        uploader.process.stdin.write(b"hurry\n")
        uploader.process.stdin.flush()
        wait_until(lambda: not spool.pending())
    assert_arrived_once(hub, tmp_path)


def test_reason_stays_while_it_is_tried_again(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    """A run that ends just then says in run.json why its uploads are missing."""
    spool = spool_with_checkpoint(tmp_path)
    hub.fail(COMMIT, times=None, status=403, message="Private repository storage limit reached, please upgrade")
    with UploaderUnderTest(spool, env) as uploader:
        wait_until(lambda: spool.read_status()["state"] == "blocked")
        hub.heal()
        again = hub.fail(COMMIT, hang=3.0, times=1)
        assert uploader.process.stdin is not None
        uploader.process.stdin.write(b"hurry\n")
        uploader.process.stdin.flush()
        wait_until(lambda: again.hits)
        status = spool.read_status()
        assert status["state"] == "uploading" and "quota" in str(status["last_error"])
        wait_until(lambda: not spool.pending())
        wait_until(lambda: spool.read_status()["state"] == "idle")
        assert spool.read_status()["last_error"] is None


def test_newer_checkpoint_wins_when_the_older_could_not_be_sent(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    spool = spool_with_checkpoint(tmp_path)
    hub.fail(COMMIT, status=503, times=None)
    with UploaderUnderTest(spool, env):
        wait_until(lambda: spool.read_status().get("state") == "waiting")
        spool.add(checkpoint_item(20, make_checkpoint(tmp_path / "run", 20)))
        wait_until(lambda: spool.pending() == ["checkpoint-20"])
        hub.heal()
        wait_until(lambda: not spool.pending())
    assert spool.read_journal()["passed_over"] == ["checkpoint-10"]
    assert [c.title for c in hub.repos[REPO].history()] == ["Push checkpoint-20", "initial commit"]


def test_repository_is_not_made_again_when_it_was_deleted(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    upload_all(spool, env)
    del hub.repos[REPO]
    spool.add(checkpoint_item(20, make_checkpoint(tmp_path / "run", 20)))
    with UploaderUnderTest(spool, env):
        wait_until(lambda: spool.read_status().get("state") == "blocked")
    assert REPO not in hub.repos
    assert "deleted or renamed" in told(spool)[-1]


def test_arrives_under_the_new_name_when_renamed(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    upload_all(spool, env)
    hub.repos["org/renamed"] = hub.repos.pop(REPO)
    hub.renamed[REPO] = "org/renamed"
    spool.add(checkpoint_item(20, make_checkpoint(tmp_path / "run", 20)))
    upload_all(spool, env)
    assert hub.repos["org/renamed"].history()[0].title == "Push checkpoint-20"


def test_push_succeeds_when_the_card_is_refused(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    hub.fail("validate-yaml", status=400, message="no such license", times=None)
    upload_all(spool, env)
    assert "README.md" not in hub.repos[REPO].files
    assert_arrived_once(hub, tmp_path)
    assert any("model card was refused" in text for text in told(spool))


def test_offline_mode_is_told_with_its_cure(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    with UploaderUnderTest(spool, {**env, "HF_HUB_OFFLINE": "1"}):
        wait_until(lambda: spool.read_status().get("state") == "blocked")
    assert "HF_HUB_OFFLINE" in told(spool)[0]
    assert not hub.requests


def test_card_arrives_when_the_endpoint_cannot_check_it(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    spool = spool_with_checkpoint(tmp_path)
    hub.fail("validate-yaml", status=404, times=None)
    upload_all(spool, env)
    assert "README.md" in hub.repos[REPO].files
    assert_arrived_once(hub, tmp_path)
