"""Promise 3 for checkpoints from the Hub: verified, or refused; no code is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.checkpoint import manifest
from launcher.hub.spool import checkpoint_item
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, upload_all
from tests.hub.server import HubServer
from tests.hub.state import Blob

_FETCH = """
import json, sys
from pathlib import Path
from launcher.errors import LauncherError
from launcher.hub import fetch_checkpoint, maybe_fetch_checkpoint
from launcher.paths import RunPaths
call = maybe_fetch_checkpoint if sys.argv[3:] else fetch_checkpoint
try:
    print(json.dumps({"path": str(call(sys.argv[1], RunPaths(Path(sys.argv[2]))))}))
except LauncherError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error), "exit_code": error.exit_code}))
assert "torch" not in sys.modules
"""


def fetch(uri: str, target: Path, env: dict[str, str], *, maybe: bool = False) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-c", _FETCH, uri, str(target), *(["maybe"] if maybe else [])]
    done = subprocess.run(command, capture_output=True, text=True, env={**inherited, **env}, timeout=60)
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


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
