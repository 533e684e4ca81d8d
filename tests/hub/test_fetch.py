"""Promise 3 for checkpoints from the Hub: verified, or refused; no code is run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.errors import UserError
from launcher.hub.items import checkpoint_item, model_item
from tests.hub.helpers import (
    REPO,
    make_checkpoint,
    make_config,
    prepare_spool,
    upload_all,
    wait_until,
    write_model,
)
from tests.hub.server import HubServer
from tests.hub.state import Blob, git_id

_FETCH = """
import json, sys
from pathlib import Path
from launcher.base.errors import LauncherError
from launcher.hub import fetch_checkpoint, maybe_fetch_checkpoint
from launcher.base.paths import RunPaths
call = {"must": fetch_checkpoint, "may": maybe_fetch_checkpoint}[sys.argv[1]]
for uri, target in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    try:
        print(json.dumps({"path": str(call(uri, RunPaths(Path(target))))}))
    except LauncherError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error), "exit_code": error.exit_code}))
assert "torch" not in sys.modules
"""


def fetch(uri: str, target: Path, env: dict[str, str], *, maybe: bool = False) -> dict[str, str]:
    return _fetch([uri, str(target)], env, "may" if maybe else "must")[0]


def fetch_all(uris: list[str], target: Path, env: dict[str, str]) -> list[dict[str, str]]:
    """Each to a folder of its own (`target`-NUMBER), in one process."""
    return _fetch([word for i, uri in enumerate(uris) for word in (uri, f"{target}-{i}")], env, "must")


def _fetch(pairs: list[str], env: dict[str, str], how: str) -> list[dict[str, str]]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", _FETCH, how, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, env={**inherited, **env}, timeout=180)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(folder: Path, original: Path) -> None:
    names = {p.relative_to(original) for p in original.rglob("*") if p.is_file()}
    assert names == {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert all((folder / n).read_bytes() == (original / n).read_bytes() for n in names)


def test_checkpoint_comes_back_as_it_was(hub: HubServer, env_of: dict[str, str], tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env_of)
    assert fetch(f"hf://{REPO}", fresh, env_of) == {"path": str(fresh / "checkpoint-10")}
    assert_same(fresh / "checkpoint-10", run / "checkpoint-10")
    assert manifest.verify(fresh / "checkpoint-10") == []
    downloads = hub.count("GET .*/resolve/")
    assert fetch(f"hf://{REPO}@last-checkpoint", fresh, env_of)["path"] == str(fresh / "checkpoint-10")
    assert hub.count("GET .*/resolve/") <= downloads + 1  # the manifest tells that all is there


def test_tags_and_folders_name_checkpoints(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints"))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    upload_all(spool, env)
    for uri, step in ((f"hf://{REPO}", 20), (f"hf://{REPO}@step-10", 10), (f"hf://{REPO}/checkpoint-10", 10)):
        fresh = tmp_path / f"fresh-{hash(uri)}"
        assert fetch(uri, fresh, env) == {"path": str(fresh / f"checkpoint-{step}")}
        assert_same(fresh / f"checkpoint-{step}", run / f"checkpoint-{step}")
    missing = fetch(f"hf://{REPO}/checkpoint-30", tmp_path / "none", env)
    assert missing["error"] == "NothingThereError" and "checkpoint-30" in missing["text"]


def test_damage_is_named_when_a_file_is_not_what_the_manifest_says(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    repo, name = hub.repos[REPO], "last-checkpoint/state/state.json"
    evil = b'{"step": 99}'
    blob = Blob(hub.store.put(evil), len(evil), repo.files[name].git_id, False)
    repo.add_commit(repo.branches, "main", "evil", {**repo.files, name: blob}, repo.branches["main"])
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert answer["error"] == "DamagedCheckpointError" and "state/state.json" in answer["text"]
    assert not (tmp_path / "fresh" / "checkpoint-10").exists()


def test_download_goes_on_when_it_was_cut(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    hub.fail("HEAD .*/state/optimizer.safetensors", status=403, message="no", times=None)
    assert fetch(f"hf://{REPO}", fresh, env)["exit_code"] == 2
    hub.heal()
    before = hub.count("GET .*/model.safetensors")
    fetch(f"hf://{REPO}", fresh, env)
    assert hub.count("GET .*/model.safetensors") == before
    assert_same(fresh / "checkpoint-10", run / "checkpoint-10")
    assert not (fresh / ".hub" / "fetch").exists()


@pytest.mark.parametrize("repo", ["org/absent", REPO])
def test_nothing_is_there(hub: HubServer, env: dict[str, str], tmp_path: Path, repo: str) -> None:
    from tests.hub.state import Repo

    hub.repos[REPO] = made = Repo(REPO)
    made.add_commit(made.branches, "main", "initial commit", {}, None)
    assert fetch(f"hf://{repo}", tmp_path / "fresh", env, maybe=True) == {"path": "None"}
    answer = fetch(f"hf://{repo}", tmp_path / "fresh", env)
    assert answer["error"] == "NothingThereError" and answer["exit_code"] == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_is_named_when_it_refuses_a_download(number: int) -> None:
    """It was said that the Hub could not be reached, and to run the same command again."""
    from launcher.hub.remote import readable_errors

    wanted = r"hf://org/model cannot be downloaded: .*Make room"
    with pytest.raises(UserError, match=wanted), readable_errors("hf://org/model"):
        raise OSError(number, os.strerror(number), "/run/.hub/fetch/x")


def test_wrong_token_is_not_taken_for_nothing(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", {**env, "HF_TOKEN": "hf_" + "x" * 34}, maybe=True)
    assert answer["error"] == "ResumeError" and "hf auth login" in answer["text"]
    assert "hf_xxx" not in answer["text"]


def test_checkpoint_comes_back_from_a_bucket(hub: HubServer, xet_env: dict[str, str], tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints", bucket="org/store"))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    upload_all(spool, xet_env)
    del hub.buckets["org/store"].files["checkpoint-20/complete.json"]  # as a killed upload leaves it
    answer = fetch("hf://buckets/org/store", fresh, xet_env)
    assert answer == {"path": str(fresh / "checkpoint-10")}
    assert_same(fresh / "checkpoint-10", run / "checkpoint-10")
    answer = fetch("hf://buckets/org/store/checkpoint-20", fresh, xet_env)
    assert answer["error"] == "NothingThereError"


def _asked_for(hub: HubServer) -> set[str]:
    """Files that were asked for since the last look, by GET or HEAD."""
    found = [re.fullmatch(r"(?:GET|HEAD) /.+?/resolve/[^/]+/(.+)", line) for line in hub.requests]
    hub.requests.clear()
    return {match[1] for match in found if match}


def _push(run: Path, env: dict[str, str], strategy: str, *steps: int, **hub: str) -> None:
    spool = prepare_spool(run, make_config(run, hub_strategy=strategy, **hub))
    for step in steps:
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    write_model(run, steps[-1])
    spool.add(model_item(run, None))
    upload_all(spool, env)


def _files(folder: Path, name: str) -> set[str]:
    return {f"{name}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*") if p.is_file()}


def test_only_the_files_of_one_checkpoint_are_asked_for(hub: HubServer, env_of: dict[str, str], tmp_path: Path) -> None:
    """Not the model at the top, the card and its picture, other checkpoints, or what somebody put beside them."""
    run = tmp_path / "run"
    _push(run, env_of, "all_checkpoints", 10, 20)
    repo = hub.repos[REPO]
    note = Blob(hub.store.put(b"mine"), 4, git_id(b"mine"), False)
    added = {"checkpoint-20/notes.txt": note, "checkpoint-20/state/rng-00007.json": note, "plots/note.txt": note}
    repo.add_commit(repo.branches, "main", "mine", {**repo.files, **added}, repo.branches["main"])
    assert {"README.md", "model.safetensors", "checkpoint-10/model.safetensors"} <= set(repo.files)
    hub.requests.clear()
    for uri, step in ((f"hf://{REPO}", 20), (f"hf://{REPO}@step-10", 10)):
        fresh = tmp_path / f"fresh-{step}"
        assert fetch(uri, fresh, env_of) == {"path": str(fresh / f"checkpoint-{step}")}
        downloads = [line for line in hub.requests if re.match(r"GET /.+/resolve/", line)]
        assert len(downloads) == len(set(downloads))
        name = f"checkpoint-{step}"
        assert _asked_for(hub) == _files(run / name, name) == _files(fresh / name, name)


def test_only_the_last_checkpoint_is_asked_for(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    _push(run, env, "checkpoint", 10)
    hub.requests.clear()
    fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert _asked_for(hub) == _files(run / "checkpoint-10", "last-checkpoint")


def test_nothing_but_the_manifest_is_asked_for_when_only_the_model_was_saved(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    folder = make_checkpoint(run, 10)
    shutil.rmtree(folder / "state")
    (folder / manifest.NAME).unlink()
    (folder / manifest.NAME).write_bytes(manifest.build(folder, step=10, world_size=1, zero_stage=0).to_json())
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, folder))
    upload_all(spool, env)
    hub.requests.clear()
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert answer["error"] == "ResumeError" and f"model.model_name_or_path={REPO}" in answer["text"]
    assert _asked_for(hub) == {"last-checkpoint/manifest.json"}


def test_download_goes_on_when_it_was_killed(hub: HubServer, env_of: dict[str, str], tmp_path: Path) -> None:
    """Promise 1, for the start of a run: a kill costs the files that were on their way, no others."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    _push(run, env_of, "all_checkpoints", 10)
    hub.requests.clear()
    hub.fail("(GET|HEAD) .*/checkpoint-10/state/optimizer.safetensors", hang=20.0, times=None)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", _FETCH, "must", f"hf://{REPO}", str(fresh)]
    with subprocess.Popen(command, env={**inherited, **env_of}) as fetching:
        missing = {*_files(run / "checkpoint-10", "checkpoint-10")} - {"checkpoint-10/state/optimizer.safetensors"}

        def is_all_else_there() -> bool:
            folders = list((fresh / ".hub" / "fetch").glob("*"))
            return bool(folders) and all((folders[0] / path).is_file() for path in missing)

        wait_until(is_all_else_there)
        fetching.kill()
    assert not (fresh / "checkpoint-10").exists()
    hub.heal()
    abandoned = next((fresh / ".hub" / "fetch").glob("*")) / ".cache" / "huggingface" / "download" / "x.incomplete"
    abandoned.write_bytes(b"half of it")
    hub.requests.clear()
    assert fetch(f"hf://{REPO}", fresh, env_of) == {"path": str(fresh / "checkpoint-10")}
    assert _asked_for(hub) == {"checkpoint-10/state/optimizer.safetensors"}
    assert_same(fresh / "checkpoint-10", run / "checkpoint-10")
    assert not (fresh / ".hub" / "fetch").exists()


def test_only_one_checkpoint_of_a_bucket_is_fetched(hub: HubServer, xet_env: dict[str, str], tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    _push(run, xet_env, "all_checkpoints", 10, 20, bucket="org/store")
    hub.requests.clear()
    hub.paths_asked.clear()
    assert fetch("hf://buckets/org/store", fresh, xet_env) == {"path": str(fresh / "checkpoint-20")}
    assert _files(fresh / "checkpoint-20", "checkpoint-20") == set(hub.paths_asked)
