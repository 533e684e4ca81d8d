"""An endpoint that is not the Hub: it deletes nothing, writes nowhere else, and fills neither disk nor memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base import manifest
from launcher.hub.answers import EndpointError, check_answer, counted
from launcher.hub.environment import is_xet_trusted
from launcher.hub.items import checkpoint_item
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
from tests.hub.server import HubServer
from tests.hub.state import Blob, git_id
from tests.hub.test_fetch import fetch, fetch_all

INFO = rf"GET /api/models/{REPO}(/revision/[^/]+)?$"
MODEL = "last-checkpoint/model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    """A repository with this checkpoint."""
    inner = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {f"last-checkpoint/{name}": data for name, data in inner.items()}


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> Path:
    """The run whose checkpoint is in REPO."""
    hub.add_repo(REPO, files_of(make_checkpoint(tmp_path / "run", 10)))
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


SHAS: list[Any] = [
    "../../../precious/x", "/tmp/x", "..", "", "a" * 39, "A" * 40, "g" * 40, "a" * 40 + "\n", 7, None, ["a"]
]  # fmt: skip


def test_nothing_is_deleted_when_the_commit_is_a_path(
    hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    make_checkpoint(precious, 1)
    before = tree(precious)
    for i, sha in enumerate(SHAS):
        hub.add_repo(f"org/evil-{i}", files_of(pushed / "checkpoint-10"))
        hub.fail(rf"GET /api/models/org/evil-{i}$", change=lambda answer, sha=sha: {**answer, "sha": sha}, times=None)
    answers = fetch_all([f"hf://org/evil-{i}" for i in range(len(SHAS))], tmp_path / "fresh", env)
    for answer in answers:
        assert answer["error"] in ("HubError", "ResumeError") and "commit" in answer["text"]
    assert tree(precious) == before
    assert not list(tmp_path.glob("fresh*/**/*.safetensors"))


@pytest.mark.parametrize("place", [".hub", ".hub/fetch"])
def test_nothing_is_deleted_when_our_own_folder_is_a_link(
    env: dict[str, str], pushed: Path, tmp_path: Path, place: str
) -> None:
    fresh, precious = tmp_path / "fresh", tmp_path / "precious"
    make_checkpoint(precious / "fetch", 1)
    (fresh / place).parent.mkdir(parents=True)
    (fresh / place).symlink_to(precious)
    before = tree(precious)
    answer = fetch(f"hf://{REPO}", fresh, env)
    assert answer["error"] == "UnsafeFileError" and "remove it" in answer["text"]
    assert tree(precious) == before


def test_download_does_not_follow_links_that_were_left_there(
    hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path
) -> None:
    fresh, precious = tmp_path / "fresh", tmp_path / "precious"
    make_checkpoint(precious, 1)
    before = tree(precious)
    commit = hub.repos[REPO].branches["main"]
    planted = fresh / ".hub" / "fetch" / f"{REPO.replace('/', '--')}-{commit}" / "last-checkpoint"
    planted.mkdir(parents=True)
    (planted / "state").symlink_to(precious / "checkpoint-1")
    (planted / "config.json").symlink_to(precious / "checkpoint-1" / "config.json")
    assert fetch(f"hf://{REPO}", fresh, env) == {"path": str(fresh / "checkpoint-10")}
    assert tree(precious) == before and manifest.verify(fresh / "checkpoint-10") == []
    assert not any(p.is_symlink() for p in fresh.rglob("*"))


@pytest.mark.parametrize("name", ["X-Repo-Commit", "ETag", "X-Linked-Etag"])
def test_hashes_in_headers_are_no_paths(
    hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path, name: str
) -> None:
    """The client takes them for names of files."""
    headers = {"X-Repo-Commit": "a" * 40, "ETag": '"abc"', "Content-Length": "3", name: '"../../../../escaped"'}
    hub.fail("(HEAD|GET) .*/resolve/", status=200, content=b"abc", headers=headers, times=None)
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert "../../../../escaped" in answer["text"] and "HF_ENDPOINT" in answer["text"]
    assert not list(tmp_path.rglob("*escaped*"))


def replace_manifest(hub: HubServer, branch: str, change: Callable[[dict[str, Any]], Any]) -> None:
    repo, name = hub.repos[REPO], f"last-checkpoint/{manifest.NAME}"
    raw = json.loads(hub.read(REPO, name))
    raw.pop("manifest_sha256")
    made = change(raw)
    data = made if isinstance(made, bytes) else json.dumps(raw).encode()
    blob = Blob(hub.store.put(data), len(data), git_id(data), False)
    repo.add_commit(repo.branches, branch, "evil", {**repo.files, name: blob}, repo.branches["main"])


def first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["files"][0].update(values)


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    first(path="../../../../escaped"), first(path="/tmp/escaped"), first(path="a/../../escaped"), first(path=""),
    first(path="."), first(path="a\nb"), first(path="\ud800"), first(path=manifest.NAME), first(bytes=-1),
    first(bytes=2**62), first(bytes=1e300), first(sha256="../x"), first(sha256=None), first(chunk_sha256=7),
    lambda raw: raw.update(step=-1), lambda raw: raw.update(step=10**30), lambda raw: raw.update(step="x"),
    lambda raw: raw["files"].append(raw["files"][0]), lambda raw: raw.update(files=7), lambda _: b"[" * 100_000,
    lambda _: b"\xff", lambda raw: json.dumps(raw).replace('"step": 10', '"step": Infinity').encode(),
]  # fmt: skip


def test_odd_manifests_are_named(hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path) -> None:
    for i, change in enumerate(CHANGES):
        replace_manifest(hub, f"evil-{i}", change)
    answers = fetch_all([f"hf://{REPO}@evil-{i}" for i in range(len(CHANGES))], tmp_path / "fresh", env)
    for i, answer in enumerate(answers):
        assert answer["error"] == "DamagedCheckpointError" and "last-checkpoint/" in answer["text"], (i, answer)
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.glob("fresh*/checkpoint-*"))


def test_nothing_is_downloaded_when_the_sizes_do_not_hold(
    hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path
) -> None:
    def longer(answer: Any) -> Any:
        return [{**e, "size": e["size"] + (e["path"] == MODEL)} for e in answer]

    hub.fail("POST .*/paths-info/", change=longer, times=None)
    hub.requests.clear()
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert answer["error"] == "DamagedCheckpointError" and "model.safetensors" in answer["text"]
    assert not hub.count(f"GET .*/{MODEL}")


@pytest.mark.parametrize("kind", ["plain", "gzip"])
@pytest.mark.parametrize("match", [rf"GET .*/{MODEL}", r"GET .*/manifest.json", INFO])
def test_body_without_end_is_cut(
    hub: HubServer, env: dict[str, str], pushed: Path, tmp_path: Path, match: str, kind: str
) -> None:
    headers = {"X-Repo-Commit": "a" * 40, "ETag": '"abc"'}
    fault = hub.fail(match, endless=True, headers=headers, times=None)
    if kind == "gzip":
        fault.headers["Content-Encoding"] = "gzip"
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        fault.prefix = packer.compress(b"0") + packer.flush(zlib.Z_FULL_FLUSH)
        fault.content = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # 1 KB that becomes 1 MB
    answer = fetch(f"hf://{REPO}", tmp_path / "fresh", env)
    assert "more bytes than it declared" in answer["text"], answer
    assert fault.sent_bytes < 2**28
    assert sum(p.stat().st_size for p in (tmp_path / "fresh").rglob("*") if p.is_file()) < 2**26


def test_uploader_ends_no_run_when_answers_have_no_end(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    fault = hub.fail("GET .*/tree/", endless=True, times=None)
    with UploaderUnderTest(spool, env):
        wait_until(lambda: spool.read_status()["state"] == "blocked")
    assert "HF_ENDPOINT" in str(spool.read_status()["last_error"]) and fault.sent_bytes < 2**28


@pytest.mark.parametrize(
    ("endpoint", "setting", "expected"),
    [
        ("https://huggingface.co", None, True), ("https://ci.huggingface.co", None, True), ("https://hf.co", "", True),
        ("http://huggingface.co", None, False), ("https://huggingface.co.evil.com", None, False),
        ("https://evil.com/huggingface.co", None, False), ("https://huggingface.co@evil.com", None, False),
        ("http://127.0.0.1:1", "", False), ("http://127.0.0.1:1", "0", True), ("http://127.0.0.1:1", "1", False),
    ],
)  # fmt: skip
def test_xet_is_used_with_the_hub_only(endpoint: str, setting: str | None, expected: bool) -> None:
    assert is_xet_trusted(endpoint, {} if setting is None else {"HF_HUB_DISABLE_XET": setting}) is expected


def test_nothing_is_written_where_the_endpoint_says(hub: HubServer, tmp_path: Path) -> None:
    """hf_xet takes casUrl=local:///DIR for a folder of this machine, which the test server answers."""
    env = {**hub_environment(hub.url, tmp_path / "home", xet=True), "HF_HUB_DISABLE_XET": ""}
    before = tree(hub.store.cas_dir)
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    assert fetch(f"hf://{REPO}", tmp_path / "fresh", env) == {"path": str(tmp_path / "fresh" / "checkpoint-10")}
    assert tree(hub.store.cas_dir) == before and not hub.count("xet-(read|write)-token")


def test_bucket_is_refused_with_its_cure_when_the_endpoint_is_not_the_hub(hub: HubServer, tmp_path: Path) -> None:
    env = {**hub_environment(hub.url, tmp_path / "home", xet=True), "HF_HUB_DISABLE_XET": ""}
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, bucket="org/store"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    with UploaderUnderTest(spool, env):
        wait_until(lambda: spool.read_status()["state"] == "blocked")
    assert "HF_HUB_DISABLE_XET=0" in str(spool.read_status()["last_error"])
    assert "HF_HUB_DISABLE_XET=0" in fetch("hf://buckets/org/store", tmp_path / "fresh", env)["text"]


_DOWNLOAD = """
import sys
import zlib
from launcher.base.errors import LauncherError
from launcher.hub import fetch_model
try:
    print(fetch_model(sys.argv[1], None))
except LauncherError as error:
    print(f"refused: {error}")
"""


def test_other_libraries_get_their_client_back(hub: HubServer, env: dict[str, str]) -> None:
    """They may download what we know no size of."""
    hub.add_repo("org/base", {"config.json": b"{}", "model.safetensors": b"abc"})
    code = f"{_DOWNLOAD}\nfrom huggingface_hub import get_session\nassert not get_session().event_hooks['response']"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code, "org/base"], capture_output=True, text=True, timeout=180,
                          env={**inherited, **env})  # fmt: skip
    assert done.returncode == 0 and "snapshots" in done.stdout, done.stderr


def test_list_without_end_is_cut() -> None:
    with pytest.raises(EndpointError, match="lists more than"):
        deque(counted(itertools.count()), maxlen=0)


def test_hash_of_an_answer_that_is_no_file_may_be_anything() -> None:
    """The Hub's own lists carry ETags with slashes."""
    request = SimpleNamespace(method="HEAD", url=SimpleNamespace(path="/api/models/org/name"))
    check_answer(SimpleNamespace(headers={"ETag": 'W/"1a-b/c+d="'}, request=request))
    request.url.path = "/org/name/resolve/main/x"
    with pytest.raises(EndpointError):
        check_answer(SimpleNamespace(headers={"ETag": 'W/"1a-b/c+d="'}, request=request))
    check_answer(SimpleNamespace(headers={"ETag": 'W/"1a-b/c"', "X-Linked-Etag": '"abc"'}, request=request))


@pytest.mark.parametrize("kind", ["sha", "etag", "endless"])
def test_models_are_not_stored_where_the_endpoint_says(
    hub: HubServer, env: dict[str, str], tmp_path: Path, kind: str
) -> None:
    hub.add_repo("org/base", {"config.json": b"{}", "model.safetensors": b"abc"})
    if kind == "sha":
        hub.fail("GET /api/models/org/base", change=lambda a: {**a, "sha": "../../../../escaped"}, times=None)
    headers = {"X-Repo-Commit": "a" * 40, "ETag": '"../../../escaped"' if kind == "etag" else '"abc"'}
    if kind == "etag":
        hub.fail("HEAD .*/resolve/", status=200, content=b"abc", headers=headers, times=None)
    fault = hub.fail("GET .*/resolve/", endless=True, headers=headers, times=None) if kind == "endless" else None
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", _DOWNLOAD, "org/base"], capture_output=True, text=True, timeout=180,
                          env={**inherited, **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout and "HF_ENDPOINT" in done.stdout
    assert not list(tmp_path.rglob("*escaped*")) and (fault is None or fault.sent_bytes < 2**28)


def test_readme_without_bound_is_not_read(hub: HubServer, env: dict[str, str], pushed: Path) -> None:
    """A card on the Hub that is no card: it is left as it is, and the checkpoint arrives."""
    repo = hub.repos[REPO]
    data = b"x" * (2**21)
    blob = Blob(hub.store.put(data), len(data), git_id(data), False)
    repo.add_commit(repo.branches, "main", "edit", {**repo.files, "README.md": blob}, repo.branches["main"])
    spool = prepare_spool(pushed, make_config(pushed, hub_strategy="checkpoint"))
    spool.add(checkpoint_item(20, make_checkpoint(pushed, 20)))
    upload_all(spool, env)
    assert repo.history()[0].title == "Push checkpoint-20" and repo.files["README.md"].size == len(data)
