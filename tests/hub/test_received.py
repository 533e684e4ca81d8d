"""A run folder that somebody else made decides nothing: where it goes, and what outside of it is read or deleted.

Promises 3 and 6: what is odd in it is named, without a traceback and without waiting for a pipe.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.base import manifest
from launcher.base.errors import LauncherError, UnsafeFileError, UserError
from launcher.base.paths import RunPaths
from launcher.cli import push
from launcher.hub import pending_uploads, pushed_checkpoints
from launcher.hub.items import Item, checkpoint_item
from launcher.hub.push import plan_push
from launcher.hub.spool import Spool
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, upload_all, write_model
from tests.hub.server import HubServer
from tests.hub.test_cli import launcher_push

EVIL = {"repo_id": "evil/loot", "create_pr": True, "private": False, "revision": "evil", "save_total_limit": 1}


@pytest.fixture
def private(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    write_model(folder, 1)
    (folder / "key.json").write_text('"secret"')
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Received: a checkpoint is pending, and its settings name the sender's repository."""
    folder = tmp_path / "run"
    config = make_config(folder, hub_strategy="checkpoint")
    spool = prepare_spool(folder, config, **EVIL)
    spool.add(checkpoint_item(10, make_checkpoint(folder, 10)))
    spool.write_journal({**spool.read_journal(), "target": "evil/loot", "repo_id": "evil/loot"})
    return folder


def item_path(run: Path) -> Path:
    return next((run / ".hub" / "queue").glob("*/item.json"))


def set_config(run: Path, **values: Any) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**raw, **values}))


def test_repository_is_that_of_the_config_when_the_run_was_made_here(run: Path) -> None:
    settings = plan_push(run, {}).settings
    assert (settings.repo_id, settings.create_pr, settings.private, settings.revision) == (REPO, False, None, None)


@pytest.mark.parametrize("made_at", ["/home/them/run", "outputs/run", "../run", None, 7])
def test_repository_must_be_given_when_the_run_comes_from_elsewhere(run: Path, made_at: Any) -> None:
    set_config(run, output_dir=made_at, hub={"hub_model_id": "evil/loot", **EVIL, "hub_private_repo": False})
    for folder in (run, run / "checkpoint-10"):
        with pytest.raises(UserError, match="--repo-id"):
            plan_push(folder, {})
        settings = plan_push(folder, {"repo_id": "me/mine"}).settings
        assert (settings.repo_id, settings.create_pr, settings.private) == ("me/mine", False, None)
        assert (settings.revision, settings.bucket, settings.save_total_limit) == (None, None, None)


def test_run_is_known_again_when_output_dir_was_relative(run: Path) -> None:
    set_config(run, output_dir=f"{run.parent.name}/{run.name}")
    assert plan_push(run, {}).settings.repo_id == REPO


def test_everything_goes_to_the_repository_that_was_given(hub: HubServer, env: dict[str, str], run: Path) -> None:
    done = launcher_push(env, str(run), "--repo-id", "me/mine")
    assert done.returncode == 0, done.stderr
    assert list(hub.repos) == ["me/mine"] and not hub.repos["me/mine"].pull_requests


def test_repository_is_not_the_one_of_the_journal_when_training_goes_on(
    hub: HubServer, env: dict[str, str], run: Path
) -> None:
    spool = Spool(run / ".hub")
    spool.write_settings(plan_push(run, {}).settings)
    for target in (REPO, "evil/loot"):
        spool.write_journal({**spool.read_journal(), "target": target, "repo_id": "evil/loot"})
    upload_all(spool, env)
    assert list(hub.repos) == [REPO] and spool.read_journal()["repo_id"] == REPO


@pytest.mark.parametrize("place", ["item", "files", "home", "file", "folder", "dotdot", "absolute"])
def test_files_outside_are_refused_when_an_item_leads_there(run: Path, private: Path, place: str) -> None:
    path = item_path(run)
    item = json.loads(path.read_text())
    if place == "item":
        item["folder"] = str(private)
    elif place == "files":
        shutil.rmtree(path.parent / "files")
        (path.parent / "files").symlink_to(private)
    elif place == "home":
        path.parent.rename(private / "home")
        path.parent.symlink_to(private / "home")
    elif place == "file":
        (path.parent / "files" / "config.json").unlink()
        (path.parent / "files" / "config.json").symlink_to(private / "key.json")
    elif place == "folder":
        shutil.rmtree(path.parent / "files" / "state")
        (path.parent / "files" / "state").symlink_to(private)
    else:
        name = "../../../../../private/key.json" if place == "dotdot" else str(private / "key.json")
        item["files"].append({"path": name, "bytes": 8, "sha256": None})
    if place not in ("home",):
        path.write_text(json.dumps(item))
    with pytest.raises(UserError, match="00000001-checkpoint-10"):
        plan_push(run, {})
    assert (private / "key.json").read_text() == '"secret"'


def test_nothing_outside_is_sent_when_the_run_itself_uploads(
    hub: HubServer, env: dict[str, str], run: Path, private: Path
) -> None:
    """As the uploader of a run that goes on in this folder."""
    link = item_path(run).parent / "files" / "config.json"
    link.unlink()
    link.symlink_to(private / "key.json")
    spool = Spool(run / ".hub")
    upload_all(spool, env)
    assert not hub.repos and not hub.uploaded_bytes
    assert "config.json is a link" in spool.read_journal()["failed"]["checkpoint-10"]
    assert "config.json is a link" in spool.events_path.read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state/state.json", manifest.NAME])
def test_checkpoint_is_refused_when_its_manifest_lists_a_link(run: Path, private: Path, name: str) -> None:
    folder = run / "checkpoint-10"
    (folder / name).rename(private / "moved")
    (folder / name).symlink_to(private / "moved")
    with pytest.raises(LauncherError, match=f"{Path(name).name}.* is a link"):
        plan_push(folder, {})


def test_model_is_refused_when_a_file_of_it_is_a_link(tmp_path: Path, private: Path) -> None:
    folder = tmp_path / "exported"
    write_model(folder, 1)
    (folder / "notes.txt").symlink_to(private / "key.json")
    with pytest.raises(UnsafeFileError, match=r"notes\.txt is a link"):
        plan_push(folder, {"repo_id": "me/mine"})


def test_linked_checkpoint_is_not_pushed_for_its_run(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make_config(run)
    make_checkpoint(elsewhere, 10)
    (run / "checkpoint-10").symlink_to(elsewhere / "checkpoint-10")
    with pytest.raises(UnsafeFileError, match=r"launcher push .*elsewhere/checkpoint-10"):
        plan_push(run, {})


def test_snapshot_of_the_hub_cache_is_pushed(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    write_model(repo / "blobs", 1)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert {f.path for f in plan_push(snapshot, {"repo_id": "me/mine"}).items[0].files} == {
        "config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "queue", "active", "trash"])
def test_nothing_is_deleted_or_taken_when_the_spool_is_a_link(run: Path, private: Path, name: str) -> None:
    folder = run / ".hub" / name
    shutil.rmtree(folder)
    (private / "00000001-model").mkdir()
    folder.symlink_to(private)
    with pytest.raises(UnsafeFileError, match="must be a folder"):
        plan_push(run, {})
    with pytest.raises(UnsafeFileError):
        Spool(run / ".hub").prepare()
    assert {p.name for p in private.iterdir()} >= {"key.json", "00000001-model", "model.safetensors"}


def test_linked_folder_in_the_trash_is_unlinked(run: Path, private: Path) -> None:
    spool = Spool(run / ".hub")
    (spool.trash_dir / "x").symlink_to(private)
    (spool.root / "tmp-1").symlink_to(private)
    spool.empty_trash()
    spool.clean_up()
    assert not list(spool.trash_dir.iterdir()) and not list(spool.root.glob("tmp-*"))
    assert (private / "key.json").exists()


def test_log_and_news_are_not_written_through_links(run: Path, private: Path) -> None:
    spool = Spool(run / ".hub")
    for path in (spool.events_path, spool.status_path, spool.ledger_path, spool.log_path, spool.root / "owner.lock"):
        path.unlink(missing_ok=True)
        path.symlink_to(private / "key.json")
    spool.tell("news")
    spool.write_status({"state": "idle"})
    spool.record(dropped=["x"])
    with pytest.raises(OSError, match="is a link"):
        spool.try_own()
    assert (private / "key.json").read_text() == '"secret"'


ODD = [b"", b"[]", b"7", b"{", b"[" * 100_000, b'{"files": 7}', b"\xff\xfe", b'{"kind": "checkpoint"}', b"null"]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_odd_items_are_named(run: Path, content: bytes) -> None:
    item_path(run).write_bytes(content)
    with pytest.raises(UserError, match="is no upload of ours"):
        plan_push(run, {})
    spool = Spool(run / ".hub")
    assert spool.claim() == []
    assert "is no upload of this run and was put aside" in spool.events_path.read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "evil"), ("kind", None), ("name", "../x"), ("name", "checkpoint-9"), ("name", 7), ("name", "a\nb"),
        ("step", "10"), ("step", True), ("step", -1), ("step", 1e400), ("files", {}), ("files", [7]), ("files", [None]),
        ("files", [{"path": "a", "bytes": "7"}]), ("files", [{"path": "a", "bytes": -7}]),
        ("files", [{"path": "a", "bytes": 7, "sha256": "../x"}]), ("files", [{"path": "/a", "bytes": 7}]),
        ("files", [{"path": "a/../../b", "bytes": 7}]), ("files", [{"path": ["a"], "bytes": 7}]),
        ("files", [{"path": "\ud800", "bytes": 7}]), ("files", [{"path": "a\u2028b", "bytes": 7}]),
    ],
)  # fmt: skip
def test_wrong_values_of_items_are_named(run: Path, key: str, value: Any) -> None:
    raw = {"kind": "checkpoint", "name": "checkpoint-10", "step": 10, "files": [], key: value}
    with pytest.raises(ValueError, match={"name": "name=", "files": "path|bytes|sha256|files"}.get(key, key)):
        Item.from_dict(raw, run, run)


@pytest.mark.parametrize("name", ["item.json", "settings.json", "journal.json", "status.json", "ledger.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "types"])
def test_nothing_hangs_or_breaks_when_a_file_of_the_spool_is_odd(run: Path, name: str, kind: str) -> None:
    spool = Spool(run / ".hub")
    path = item_path(run) if name == "item.json" else spool.root / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        keys = ("pushed", "failed", "passed_over", "commit_times", "card", "dropped", "state", "tried_at", "repo_id")
        path.write_text(json.dumps({key: [[7]] for key in [*keys, "tags_due", "files", "name", "strategy"]}))
    try:
        plan_push(run, {"repo_id": "me/mine"})
    except LauncherError as error:
        assert name == "item.json" and "00000001-checkpoint-10 is no upload of ours" in str(error)
    assert pending_uploads(RunPaths(run)) == ["checkpoint-10"] and pushed_checkpoints(RunPaths(run)) == {}
    assert spool.read_ledger() == {"passed_over": [], "dropped": []}
    assert spool.read_status()["state"] == "" and spool.held_bytes() >= 0
    assert name == "settings.json" or spool.read_settings().strategy == "checkpoint"


@pytest.mark.parametrize("name", ["uploader.lock", "events.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_odd_files_of_the_spool_are_named_when_pushing(run: Path, env: dict[str, str], name: str, kind: str) -> None:
    path = run / ".hub" / name
    path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "link": lambda p: p.symlink_to("/etc/hostname"), "folder": Path.mkdir}[kind](path)  # type: ignore[operator]
    with pytest.raises(UserError, match=name):
        push.main([str(run)])


def test_names_that_are_no_items_are_left_alone(run: Path) -> None:
    spool = Spool(run / ".hub")
    for name in ("00000002-a\nb", "00000003-\u202egnp", "../x", "\u0660" * 8 + "-x", "00000004-[red]m[/x]"):
        if "/" not in name:
            (spool.queue_dir / name).mkdir()
    os.mkfifo(spool.queue_dir / "00000005-pipe")
    assert spool.pending() == ["checkpoint-10", "pipe"]
    assert [item.name for item in spool.claim(limit=5)] == ["checkpoint-10"]


def test_escape_sequences_are_not_shown(run: Path) -> None:
    from launcher.hub.records import lines_from

    spool = Spool(run / ".hub")
    spool.tell("a\x1b[2J\rb\u202e")
    with spool.events_path.open("a") as file:
        file.write('{"text": 7}\n[]\n{"text": "whole"}\n{"text": "cut')
    texts, offset = lines_from(spool.events_path, 0)
    assert texts == ["a [2J b ", "whole"]
    assert lines_from(spool.events_path, offset) == ([], offset)


@pytest.mark.parametrize("name", ["model.safetensors", "state/state.json"])
def test_damaged_checkpoint_is_named_instead_of_pushed(
    hub: HubServer, env_of: dict[str, str], run: Path, name: str
) -> None:
    folder = run / "checkpoint-10"
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    with (folder / name).open("r+b") as file:  # the spool has links to the same bytes
        file.write(data)
    done = launcher_push(env_of, str(folder))
    assert done.returncode == 1
    assert f"checkpoint-10 is not pushed: {name} does not match its hash" in done.stderr
    spool = Spool(run / ".hub")
    spool.write_settings(plan_push(run, {}).settings)
    upload_all(spool, env_of)
    assert "does not match its hash" in spool.read_journal()["failed"]["checkpoint-10"]
    assert [c.title for c in hub.repos[REPO].history()] == ["initial commit"]
    spool.add(checkpoint_item(20, make_checkpoint(run, 20)))
    upload_all(spool, env_of)
    assert hub.repos[REPO].history()[0].title == "Push checkpoint-20"
