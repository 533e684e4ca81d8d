"""A bucket as the target: compared by hash, complete when its marker is there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.hub.items import checkpoint_item, model_item
from tests.hub.helpers import (
    UploaderUnderTest,
    make_checkpoint,
    make_config,
    prepare_spool,
    upload_all,
    wait_until,
    write_model,
)
from tests.hub.server import HubServer

BUCKET = "org/store"


def read(hub: HubServer, path: str) -> bytes:
    xet_hash, size, _ = hub.buckets[BUCKET].files[path]
    return hub.store.read_xet(xet_hash, size)


def test_checkpoints_arrive_whole_and_old_ones_go(hub: HubServer, xet_env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(run, hub_strategy="all_checkpoints", bucket=BUCKET, save_total_limit=2)
    spool = prepare_spool(run, config)
    for step in (10, 20, 30):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    write_model(run, 30)
    spool.add(model_item(run, None))
    upload_all(spool, xet_env)
    paths = set(hub.buckets[BUCKET].files)
    assert {p.split("/")[0] for p in paths} == {"checkpoint-20", "checkpoint-30", "model", "latest.json"}
    for path in (run / "checkpoint-30").rglob("*"):
        if path.is_file():
            assert read(hub, path.relative_to(run).as_posix()) == path.read_bytes()
    assert json.loads(read(hub, "latest.json")) == {"folder": "model"}
    marker = json.loads(read(hub, "checkpoint-30/complete.json"))["files"]
    assert set(marker) == {p.split("/", 1)[1] for p in paths if p.startswith("checkpoint-30/")} - {"complete.json"}


def test_content_is_compared_by_hash_when_size_is_equal(
    hub: HubServer, xet_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="end", bucket=BUCKET))
    for seed in (1, 2, 2):
        write_model(run, seed)  # the same names and sizes, other bytes
        spool.add(model_item(run, None))
        batches = hub.count("POST .*/batch")
        upload_all(spool, xet_env)
        assert read(hub, "model/model.safetensors") == (run / "model.safetensors").read_bytes()
    assert hub.count("POST .*/batch") == batches + 1  # the third time only latest.json is written


@pytest.mark.parametrize("state", ["uploaded", "unmarked"])
def test_folder_is_not_complete_when_uploader_is_killed(
    hub: HubServer, xet_env: dict[str, str], tmp_path: Path, state: str
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="end", bucket=BUCKET))
    write_model(run, 1)
    spool.add(model_item(run, None))
    if state == "unmarked":
        upload_all(spool, xet_env)
        write_model(run, 2)
        spool.add(model_item(run, None))
    with UploaderUnderTest(spool, xet_env, crash_at=(state, 1)) as uploader:
        uploader.process.wait(timeout=120)
    assert "model/complete.json" not in hub.buckets[BUCKET].files
    upload_all(spool, xet_env)
    assert "model/complete.json" in hub.buckets[BUCKET].files
    assert read(hub, "model/model.safetensors") == (run / "model.safetensors").read_bytes()


def test_half_sent_checkpoint_goes_when_a_newer_one_makes_it_pointless(
    hub: HubServer, xet_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="checkpoint", bucket=BUCKET))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    with UploaderUnderTest(spool, xet_env, crash_at=("uploaded", 1)) as uploader:
        uploader.process.wait(timeout=120)
    assert "checkpoint-10/model.safetensors" in hub.buckets[BUCKET].files
    spool.add(checkpoint_item(20, make_checkpoint(run, 20)))
    upload_all(spool, xet_env)
    assert {p.split("/")[0] for p in hub.buckets[BUCKET].files} == {"checkpoint-20", "latest.json"}


def test_bandwidth_is_capped(hub: HubServer, xet_env: dict[str, str], tmp_path: Path) -> None:
    run, cap = tmp_path / "run", 300_000.0
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints", bucket=BUCKET, max_bytes_per_s=cap))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step, num_bytes=300_000)))
    started = time.time()
    upload_all(spool, xet_env)
    files = hub.buckets[BUCKET].files
    num_bytes = sum(size for path, (_, size, _) in files.items() if path.endswith(".safetensors"))
    assert num_bytes > 1_200_000
    assert max(arrived for _, _, arrived in files.values()) - started > num_bytes / cap
    for path in (run / "checkpoint-20").rglob("*"):
        if path.is_file():
            assert read(hub, path.relative_to(run).as_posix()) == path.read_bytes()


def test_finished_files_are_not_sent_again_when_a_capped_upload_is_killed(
    hub: HubServer, xet_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config(run, hub_strategy="all_checkpoints", bucket=BUCKET, max_bytes_per_s=5e6)
    spool = prepare_spool(run, config)
    spool.add(checkpoint_item(10, make_checkpoint(run, 10, num_bytes=9_000_000)))
    with UploaderUnderTest(spool, xet_env):
        wait_until(lambda: BUCKET in hub.buckets and "checkpoint-10/model.safetensors" in hub.buckets[BUCKET].files)
    sent = hub.buckets[BUCKET].files["checkpoint-10/model.safetensors"]
    assert "checkpoint-10/complete.json" not in hub.buckets[BUCKET].files
    upload_all(spool, xet_env)
    assert hub.buckets[BUCKET].files["checkpoint-10/model.safetensors"] == sent  # with the time of its arrival
    assert "checkpoint-10/complete.json" in hub.buckets[BUCKET].files
