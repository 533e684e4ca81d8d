"""What arrives on the Hub, over both transports."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.hub.items import checkpoint_item, model_item
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, upload_all, write_model
from tests.hub.server import HubServer

MODEL_FILES = {"model.safetensors", "config.json", "tokenizer_config.json"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_model_is_at_the_top_when_every_save(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    checkpoint = make_checkpoint(run, 10)
    spool.add(checkpoint_item(10, checkpoint))
    upload_all(spool, env)
    assert set(hub.repos[REPO].files) == MODEL_FILES | {".gitattributes", "README.md", "loss_curve.png"}
    for name in MODEL_FILES:
        assert hub.read(REPO, name) == (checkpoint / name).read_bytes()


def test_last_checkpoint_is_whole_and_replaced_when_checkpoint(
    hub: HubServer, env_of: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    first = make_checkpoint(run, 10)
    (first / "state" / "extra.safetensors").write_bytes(b"only in the first")
    from launcher.base import manifest

    (first / "manifest.json").write_bytes(manifest.build(first, step=10, world_size=1, zero_stage=0).to_json())
    for step, folder in ((10, first), (20, make_checkpoint(run, 20))):
        spool.add(checkpoint_item(step, folder))
        upload_all(spool, env_of)
    there = {p: hub.read(REPO, p) for p in hub.repos[REPO].files if p.startswith("last-checkpoint/")}
    assert there == {f"last-checkpoint/{p}": data for p, data in files_of(run / "checkpoint-20").items()}
    assert [c.title for c in hub.repos[REPO].history()] == [
        "Push checkpoint-20",
        "Push checkpoint-10",
        "initial commit",
    ]


def test_each_checkpoint_has_folder_and_tag_when_all_checkpoints(
    hub: HubServer, env_of: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints"))
    for step in (10, 20, 30):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    upload_all(spool, env_of)
    repo = hub.repos[REPO]
    assert set(repo.tags) == {"step-10", "step-20", "step-30"}
    for step in (10, 20, 30):
        for name, data in files_of(run / f"checkpoint-{step}").items():
            assert hub.read(REPO, f"checkpoint-{step}/{name}") == data
        at_tag = hub.read(REPO, "model.safetensors", f"step-{step}")
        assert at_tag == (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_nothing_is_sent_again_when_nothing_changed(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    for _ in range(2):
        spool.add(checkpoint_item(10, run / "checkpoint-10" if _ else make_checkpoint(run, 10)))
        upload_all(spool, env)
    assert hub.count("POST .*/commit/") == 1
    sent = hub.uploaded_bytes
    write_model(run, 10)  # the final model has the very bytes of the checkpoint
    for num_commits in (2, 2):  # the card says now that the run has ended; nothing does after that
        spool.add(model_item(run, None))
        upload_all(spool, env)
        assert hub.count("POST .*/commit/") == num_commits
    assert "multiple times" not in spool.log_path.read_text()
    assert hub.uploaded_bytes == sent


def test_equal_bytes_are_sent_once_when_under_two_paths(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    checkpoint = make_checkpoint(run, 10, num_bytes=300_000)
    spool.add(checkpoint_item(10, checkpoint))
    upload_all(spool, env)
    state = checkpoint / "state" / "optimizer.safetensors"
    once = (checkpoint / "model.safetensors").stat().st_size + state.stat().st_size
    assert hub.uploaded_bytes < once + 20_000


def test_retention_keeps_best_and_newest_when_limited(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(run, hub_strategy="all_checkpoints", save_total_limit=2)
    spool = prepare_spool(run, config, squash_interval_s=3600.0)
    for step in (10, 20, 30, 40):
        spool.add(checkpoint_item(step, make_checkpoint(run, step, best=10)))
        upload_all(spool, env)
    repo = hub.repos[REPO]
    folders = {p.split("/")[0] for p in repo.files if "/" in p}
    assert folders == {"checkpoint-10", "checkpoint-40"}
    assert set(repo.tags) == {"step-10", "step-40"}
    assert repo.squashes == 1  # at most one an hour
    spool.write_journal({**spool.read_journal(), "last_squash": time.time() + 1e7})  # before the clock was set back
    for step in (50, 60):
        spool.add(checkpoint_item(step, make_checkpoint(run, step, best=10)))
        upload_all(spool, env)
    assert repo.squashes == 2
    card = hub.read(REPO, "README.md").decode()
    assert "| 10 |" in card and "| 60 |" in card and "| 20 |" not in card


def test_foreign_folders_stay_when_retention_runs(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints", save_total_limit=1))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    repo = hub.repos[REPO]
    blob = repo.files["config.json"]
    files = {**repo.files, "checkpoint-5/config.json": blob, "notes/config.json": blob}
    repo.add_commit(repo.branches, "main", "by the user", files, repo.branches["main"])
    spool.add(checkpoint_item(20, make_checkpoint(run, 20)))
    upload_all(spool, env)
    assert {"checkpoint-5/config.json", "notes/config.json"} <= set(repo.files)
    assert not any(p.startswith("checkpoint-10/") for p in repo.files)


def test_old_shards_go_when_the_model_has_other_files(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="end"))
    write_model(run, 1)
    (run / "model.safetensors").rename(run / "model-00001-of-00001.safetensors")
    spool.add(model_item(run, None))
    upload_all(spool, env)
    (run / "model-00001-of-00001.safetensors").unlink()
    write_model(run, 2)
    spool.add(model_item(run, None))
    upload_all(spool, env)
    assert [p for p in hub.repos[REPO].files if p.endswith(".safetensors")] == ["model.safetensors"]


def test_branch_is_made_when_a_revision_is_set(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(run, hub_strategy="every_save", hub_revision="experiment", hub_private_repo=True)
    spool = prepare_spool(run, config)
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    repo = hub.repos[REPO]
    assert repo.private
    assert "model.safetensors" in repo.resolve("experiment").files
    assert "model.safetensors" not in repo.files


def test_user_name_is_added_when_the_id_has_none(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save", hub_model_id=None))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    assert list(hub.repos) == ["tester/test-run"]


def test_commits_are_shared_when_saves_come_too_fast(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints"), commits_per_hour=1200)
    journal = spool.read_journal()
    import time

    journal["commit_times"] = [time.time()] * 700  # over half the budget is used: from here one commit in 6 s
    spool.write_journal({**journal, "target": REPO})
    for step in (10, 20, 30, 40):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    upload_all(spool, env)
    assert set(hub.repos[REPO].tags) == {"step-10", "step-20", "step-30", "step-40"}
    assert hub.count("POST .*/commit/") == 1


@pytest.mark.parametrize("page_size", [3])
def test_tree_is_read_to_its_end_when_paged(
    hub: HubServer, env: dict[str, str], tmp_path: Path, page_size: int
) -> None:
    run = tmp_path / "run"
    hub.page_size = page_size
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint"))
    for _ in range(2):
        spool.add(checkpoint_item(10, run / "checkpoint-10" if _ else make_checkpoint(run, 10)))
        upload_all(spool, env)
    assert hub.count("POST .*/commit/") == 1


def test_bandwidth_is_capped(hub: HubServer, xet_env: dict[str, str], tmp_path: Path) -> None:
    import time

    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save", max_bytes_per_s=200_000.0))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10, num_bytes=500_000)))
    started = time.monotonic()
    upload_all(spool, xet_env)
    assert time.monotonic() - started > 2.3
    assert hub.uploaded_bytes > 500_000  # over HTTP, because Xet knows no cap
