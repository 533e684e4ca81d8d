"""Decisions without a server: rates, waiting times, layouts, addresses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.errors import ResumeError, UnsafeFileError
from launcher.hub.curve import draw_curve
from launcher.hub.faults import Backoff, classify, next_commit_delay_s, redact, remember_token
from launcher.hub.fetch import choose_folder, model_files, parse_uri
from launcher.hub.items import UploadSettings, checkpoint_item, model_item
from launcher.hub.layout import outdated_folders, stale_paths, wanted_files
from launcher.hub.spool import Spool
from tests.hub.helpers import make_checkpoint, make_config, prepare_spool, write_model


def test_commits_stay_below_the_limit_when_saves_never_stop() -> None:
    now, times = 0.0, []
    while now < 7200.0:
        now += next_commit_delay_s(times, now, 100)
        times.append(now)
        now += 1.0  # a save every second
    for start in times:
        assert sum(start <= t < start + 3600.0 for t in times) <= 100
    assert max(b - a for a, b in pairwise(times)) < 200.0  # spread, no stall of most of an hour


def test_a_burst_is_not_delayed_when_the_hour_was_quiet() -> None:
    assert next_commit_delay_s([0.0] * 200 + [5000.0] * 49, 5000.0, 100) == 0.0


def test_waits_grow_and_differ() -> None:
    waits = [Backoff(2.0, 300.0).next_s() for _ in range(20)]
    assert len(set(waits)) > 10 and all(1.0 <= w <= 2.0 for w in waits)
    backoff = Backoff(2.0, 300.0)
    later = [backoff.next_s() for _ in range(200)][-1]
    assert 150.0 <= later <= 300.0
    assert Backoff(2.0, 300.0).next_s(retry_after_s=900.0) >= 900.0


def test_unknown_errors_are_worth_retrying() -> None:
    assert classify(ConnectionResetError("reset"), "a/b").kind == "transient"
    assert classify(RuntimeError("something odd"), "a/b").kind == "transient"
    assert classify(RuntimeError("HTTP status client error (403 Forbidden) for url"), "a/b").kind == "permanent"


def test_tokens_are_removed_from_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-without-a-shape")
    text = redact("Bearer abc hf_abcdefghijklmnop secret-without-a-shape https://s3/x?X-Amz-Signature=1")
    assert text == "*** *** *** https://s3/x"
    assert redact("GET https://me:word@hub.intern/api failed") == "GET https://hub.intern/api failed"
    remember_token("from-the-token-file")
    assert redact("Invalid: from-the-token-file.") == "Invalid: ***."
    remember_token(None)


def test_top_is_of_one_model_when_uploads_share_a_commit(tmp_path: Path) -> None:
    items = [checkpoint_item(s, make_checkpoint(tmp_path, s)) for s in (10, 20)]
    write_model(tmp_path / "final", 3)
    (tmp_path / "final" / "model.safetensors").rename(tmp_path / "final" / "model-00001-of-00001.safetensors")
    wanted = wanted_files([*items, model_item(tmp_path / "final", None)], "all_checkpoints")
    assert "model.safetensors" not in wanted and "model-00001-of-00001.safetensors" in wanted
    assert {"checkpoint-10/manifest.json", "checkpoint-20/state/state.json"} <= set(wanted)
    assert not any(p in wanted for p in ("manifest.json", "trainer_state.json", "state/state.json"))


def test_own_files_of_a_run_are_not_published(tmp_path: Path) -> None:
    write_model(tmp_path, 1)
    for name in ("run.json", "metrics.jsonl", "config.yaml", ".lock", "evil.bin", "code.py", "report.html"):
        (tmp_path / name).write_text("x")
    names = {f.path for f in model_item(tmp_path, None).files}
    assert names == {"model.safetensors", "config.json", "tokenizer_config.json"}


def test_a_tokenizers_further_templates_go_to_the_top_and_are_those_of_the_newest_model(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (10, 20)]
    for folder, name in zip(folders, ("old", "tool_use"), strict=True):
        (folder / "additional_chat_templates").mkdir()
        (folder / f"additional_chat_templates/{name}.jinja").write_text("{{ messages }}")
        step = int(folder.name.rpartition("-")[2])
        (folder / "manifest.json").write_bytes(manifest.build(folder, step=step, world_size=1, zero_stage=0).to_json())
    wanted = wanted_files([checkpoint_item(s, f) for s, f in zip((10, 20), folders, strict=True)], "every_save")
    assert {p for p in wanted if "/" in p} == {"additional_chat_templates/tool_use.jinja"}
    for name in (".", "additional_chat_templates"):  # as a run's end publishes them
        for path in (folders[1] / name).glob("*.*"):
            if path.is_file() and path.name not in ("manifest.json", "trainer_state.json"):
                (tmp_path / "run" / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "run" / name / path.name).write_bytes(path.read_bytes())
    item = model_item(tmp_path / "run", None)
    assert "additional_chat_templates/tool_use.jinja" in {f.path for f in item.files}
    assert set(wanted_files([item], "end")) == {f.path for f in item.files}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "additional_chat_templates/x.jinja"])
def test_a_model_is_refused_by_name_when_a_file_is_a_link_to_itself(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, 1)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(Path(name).name)
    with pytest.raises(UnsafeFileError, match="is a link"):
        model_item(tmp_path, None)


def test_stale_files_are_those_of_the_old_model_only() -> None:
    remote = ["model-00001-of-00002.safetensors", "notes.md", "last-checkpoint/old", "other/x", "adapter_config.json"]
    stale = stale_paths(["model.safetensors", "last-checkpoint/new"], remote)
    assert stale == ["model-00001-of-00002.safetensors", "last-checkpoint/old", "adapter_config.json"]
    assert stale_paths(["README.md"], remote) == []


@pytest.mark.parametrize(
    ("limit", "best", "gone"),
    [(None, 1, []), (1, None, [1, 2, 3]), (1, 1, [2, 3]), (2, 1, [2, 3]), (3, 1, [2]), (9, 1, [])],
)
def test_retention_keeps_best_and_newest(limit: int | None, best: int | None, gone: list[int]) -> None:
    remote = [f"checkpoint-{s}/manifest.json" for s in (1, 2, 3)]
    found = outdated_folders(["checkpoint-4/manifest.json"], remote, limit, best)
    assert found == [f"checkpoint-{s}" for s in gone]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://a/b", ("a/b", None, None)),
        ("hf://a/b@main", ("a/b", "main", None)),
        ("hf://a/b@step-500", ("a/b", "step-500", "checkpoint-500")),
        ("hf://a/b@last-checkpoint", ("a/b", None, "last-checkpoint")),
        ("hf://a/b/checkpoint-7@refs/pr/1", ("a/b", "refs/pr/1", "checkpoint-7")),
    ],
)
def test_addresses_are_understood(uri: str, expected: tuple[str, str | None, str | None]) -> None:
    source = parse_uri(uri)
    assert (source.repo_id, source.revision, source.folder) == expected


def test_bad_address_is_refused_with_examples() -> None:
    with pytest.raises(ResumeError, match="hf://ORG/NAME@REVISION"):
        parse_uri("hf://nonsense")


def test_newest_folder_is_chosen() -> None:
    paths = ["checkpoint-9/manifest.json", "checkpoint-10/manifest.json", "checkpoint-11/config.json"]
    assert choose_folder(paths, None) == "checkpoint-10"
    assert choose_folder(paths, "checkpoint-11") is None
    assert choose_folder([*paths, "last-checkpoint/manifest.json"], None) == "last-checkpoint"


def test_curve_is_a_png_and_the_same_every_time() -> None:
    import io

    from PIL import Image

    points = [(s, 1.0 / s) for s in range(1, 50)]
    data = draw_curve(points, [(10, 0.5)])
    assert data == draw_curve(points, [(10, 0.5)])
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.size == (720, 360)
    assert draw_curve([(1, 2.0)], []) and draw_curve([], [(5, 1e9), (6, 1e-9)])


def test_pending_upload_is_seen_when_it_is_claimed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    names = Spool.names

    def claimed_after_reading(self: Spool, folder: Path) -> list[str]:
        found = names(self, folder)
        for name in names(self, self.queue_dir):
            (self.queue_dir / name).rename(self.active_dir / name)
        return found

    monkeypatch.setattr(Spool, "names", claimed_after_reading)
    assert spool.pending() == ["checkpoint-10"]


def test_model_files_are_those_at_the_top() -> None:
    here = ["config.json", "model.safetensors.index.json", "tokenizer.model", "additional_chat_templates/tool.jinja"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    elsewhere = ["checkpoint-10/model.safetensors", "last-checkpoint/config.json", "onnx/model.onnx", "original/x.json"]
    doubles = ["consolidated.safetensors", "pytorch_model.bin", "README.md"]
    listed = [*here, *weights, *elsewhere, *doubles, "modeling.py"]
    assert model_files(listed, with_weights=True, with_code=False) == [*here, *weights]
    assert model_files(listed, with_weights=False, with_code=True) == [*here, "modeling.py"]
    assert model_files(["pytorch_model.bin"], with_weights=True, with_code=False) == ["pytorch_model.bin"]


def test_card_is_of_the_checkpoint_that_was_pushed_last_when_a_run_began_again(tmp_path: Path) -> None:
    """Not of the highest step that was ever there: `last-checkpoint/` was replaced."""
    from launcher.hub.repo import RepoTarget  # imports the client

    journal = {"pushed": {f"checkpoint-{step}": {"step": step} for step in (50, 60)}}
    target = RepoTarget(None, UploadSettings(str(tmp_path), "checkpoint"), journal)  # type: ignore[arg-type]
    item = checkpoint_item(10, make_checkpoint(tmp_path, 10))
    assert target._steps_there([item], [], []) == [10]
    journal["pushed"]["checkpoint-10"] = {"step": 10}
    assert target._steps_there([model_item(tmp_path, None)], [], []) == [10]


def test_what_a_user_keeps_beside_the_model_of_a_run_is_not_sent(tmp_path: Path) -> None:
    """Promise 6: `credentials.json` and `token.txt` in output_dir went into the repository with the final model."""
    make_checkpoint(tmp_path, 10)
    write_model(tmp_path, 10)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for name in ("credentials.json", "token.txt", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    sent = [file.path for file in model_item(tmp_path, None).files]
    assert sent == [
        "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer_config.json",
    ]  # fmt: skip
