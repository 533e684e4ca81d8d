"""The model card: valid for the Hub, and never at the cost of the user's own text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.settings import to_dict
from launcher.hub import card, metadata
from launcher.hub.items import Item, UploadSettings, checkpoint_item, model_item
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, upload_all, write_model
from tests.hub.server import HubServer
from tests.hub.state import card_problems


def build(run: Path, items: list[Item], existing: str | None = None, last: dict[str, Any] | None = None) -> card.Card:
    settings = UploadSettings(str(run), "all_checkpoints", repo_id=REPO)
    return card.build_card(settings, REPO, items, [10, 20], existing, last or {})


def header_of(text: str) -> dict[str, Any]:
    return card.split(text)[0]


@pytest.mark.parametrize(
    ("base", "license", "language"),
    [
        ("/data/models/llama", "apache-2.0", ["en"]),
        ("./llama", "Apache 2.0", ["english", "de"]),
        ("org/base", "my own license!", []),
        (None, None, ["en"]),
    ],
)
def test_header_is_accepted_when_settings_are_odd(
    tmp_path: Path, base: str | None, license: str | None, language: list[str]
) -> None:
    config = make_config(tmp_path, license=license, language=language, tags=["math"])
    config.model.model_name_or_path = base
    config.data.dataset_name = "/data/rows"

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "eval_loss": NaN, "eval_accuracy": 0.5}\n')
    made = build(tmp_path, [checkpoint_item(30, make_checkpoint(tmp_path, 30))])
    assert card_problems(made.text, set(metadata.LICENSES)) == []
    header = header_of(made.text)
    assert header.get("base_model") == ("org/base" if base == "org/base" else None)
    assert "datasets" not in header
    assert header["tags"] == ["launcher", "math"]
    assert header["model-index"][0]["results"][0]["metrics"] == [
        {"type": "accuracy", "value": 0.5, "name": "eval_accuracy"}
    ]
    assert "/data" not in made.text


def test_unknown_license_is_told_with_the_nearest(tmp_path: Path) -> None:
    make_config(tmp_path, license="apache2.0")
    made = build(tmp_path, [checkpoint_item(10, make_checkpoint(tmp_path, 10))])
    assert header_of(made.text)["license"] == "other"
    assert any("apache-2.0" in notice for notice in made.notices)


def test_users_text_stays_byte_for_byte(tmp_path: Path) -> None:
    make_config(tmp_path)
    items = [checkpoint_item(10, make_checkpoint(tmp_path, 10))]
    mine = "---\nlicense: mit\npipeline_tag: text2text-generation\n---\n# My model\n\nMy words, \\1 and all.\n"
    first = build(tmp_path, items, existing=mine)
    assert "# My model\n\nMy words, \\1 and all.\n" in first.text
    assert header_of(first.text)["license"] == "mit"
    assert header_of(first.text)["pipeline_tag"] == "text2text-generation"
    edited = first.text.replace("# My model", "# Renamed") + "\nBelow.\n"
    second = build(tmp_path, items, existing=edited, last={"metadata": first.metadata})
    assert second.text == edited


def test_our_header_entries_follow_the_settings_and_theirs_stay(tmp_path: Path) -> None:
    ours = {"license": "mit", "tags": ["launcher"]}
    theirs = {"license": "apache-2.0", "tags": ["launcher", "mine"], "extra": 1}
    merged = metadata.merge(theirs, ours, {"license": "apache-2.0", "tags": ["launcher"]})
    assert merged == {"license": "mit", "tags": ["launcher", "mine"], "extra": 1}
    assert metadata.merge({"license": "mit"}, {}, {"license": "mit"}) == {}


@pytest.mark.parametrize("kind", ["final", "folder"])
def test_results_are_the_best_ones_when_the_best_model_is_sent(tmp_path: Path, kind: str) -> None:
    config = make_config(tmp_path)
    config.checkpoint.load_best_model_at_end = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "eval_loss": 0.1, "eval_runtime_s": 3.5}\n{"step": 20, "eval_loss": 0.9}\n'
        '{"step": 20, "loss": 1.0}\n'
    )
    write_model(tmp_path, 1)
    made = build(tmp_path, [model_item(tmp_path, None, kind=kind)])
    assert "Measured at step 10." in made.text
    assert "eval_runtime_s" not in made.text
    assert "| 10 |  | 0.1 | `checkpoint-10/`, tag `step-10` | best |" in made.text


def test_adapter_is_loaded_with_peft(tmp_path: Path) -> None:
    make_config(tmp_path)
    write_model(tmp_path, 1)
    (tmp_path / "adapter_config.json").write_text("{}")
    made = build(tmp_path, [model_item(tmp_path, None)])
    assert header_of(made.text)["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in made.text


def test_readme_on_the_hub_is_kept(hub: HubServer, env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="every_save"))
    spool.add(checkpoint_item(10, make_checkpoint(run, 10)))
    upload_all(spool, env)
    repo = hub.repos[REPO]
    text = hub.read(REPO, "README.md").decode() + "\nWritten on the website.\n"
    from tests.hub.state import Blob, git_id

    blob = Blob(hub.store.put(text.encode()), len(text.encode()), git_id(text.encode()), False)
    repo.add_commit(repo.branches, "main", "edit", {**repo.files, "README.md": blob}, repo.branches["main"])
    spool.add(checkpoint_item(20, make_checkpoint(run, 20)))
    upload_all(spool, env)
    assert "Written on the website." in hub.read(REPO, "README.md").decode()
    assert hub.count("validate-yaml") == 2


@pytest.mark.parametrize(
    "header",
    [
        "model-index: 7", "model-index: [{name: x}]", "eval_results: [7]", "ignore_metadata_errors: true", "7: 8",
        "[1]", "tags: {a: b}", "language: 7", "{", "- x", "a: &a [*a]",
        "a: !!python/object/apply:os.system [touch escaped]",
    ],
)  # fmt: skip
def test_odd_headers_lose_nothing_and_break_nothing(tmp_path: Path, header: str) -> None:
    make_config(tmp_path)
    items = [checkpoint_item(10, make_checkpoint(tmp_path, 10))]
    made = build(tmp_path, items, existing=f"---\n{header}\n---\n# Mine\n\nMy words.\n")
    assert "# Mine\n\nMy words.\n" in made.text and header_of(made.text)["library_name"] == "transformers"
    assert not Path("escaped").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "huge"])
def test_nothing_outside_is_read_for_the_card(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    make_config(run)
    items = [checkpoint_item(10, make_checkpoint(run, 10))]
    (tmp_path / "secret").write_text("model: {model_name_or_path: secret/words}\n")
    for name in ("README.md", "config.yaml", "metrics.jsonl"):
        path = run / name
        path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to(tmp_path / "secret")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            with path.open("wb") as file:
                file.truncate(2**24 if name == "metrics.jsonl" else 2**40)
    made = build(run, items)
    assert "secret" not in made.text and len(made.text) < 10_000


@pytest.mark.parametrize("is_absolute", [True, False])
def test_local_folder_is_no_base_model_when_pushed_from_another_place(tmp_path: Path, is_absolute: bool) -> None:
    """`models/llama` looks like a repository; the run was started in the folder that holds it."""
    run = tmp_path / "outputs" / "run"
    config = make_config(run)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    config.model.model_name_or_path = str(tmp_path / "models/llama") if is_absolute else "models/llama"
    config.data.dataset_name = "models/llama"
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    header = header_of(build(run, [checkpoint_item(10, make_checkpoint(run, 10))]).text)
    assert "base_model" not in header and "datasets" not in header


def test_memory_is_not_filled_when_a_config_names_itself_many_times(tmp_path: Path) -> None:
    make_config(tmp_path)
    lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
    aliases = "hub: {license: *a39, tags: *a39, language: *a39}\nseed: *a39\ndata: {max_length: *a39, sources: *a39}\n"
    (tmp_path / "config.yaml").write_text(f"a0: &a0 x\n{lists}{aliases}")
    assert len(build(tmp_path, [checkpoint_item(10, make_checkpoint(tmp_path, 10))]).text) < 10_000


@pytest.mark.parametrize("value", [7, "x", [7], {"a": 7}, [[[]]]])
def test_odd_settings_break_nothing(tmp_path: Path, value: Any) -> None:
    make_config(tmp_path)
    for key in ("hub", "data", "model", "train", "checkpoint"):
        names = ("tags", "license", "language", "sources", "dataset_name", "model_name_or_path", "max_steps")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({key: dict.fromkeys(names, value)}))
        made = build(tmp_path, [checkpoint_item(10, make_checkpoint(tmp_path / key, 10))])
        assert card_problems(made.text, set(metadata.LICENSES)) == []


@pytest.mark.parametrize(("best", "shown"), [(10, 10), (None, 20)])
def test_results_are_those_of_the_saved_model_when_the_best_measured_one_was_not_saved(
    tmp_path: Path, best: int | None, shown: int
) -> None:
    """Evaluated more often than saved, or a save that failed: the card told results of weights that nobody has."""
    config = make_config(tmp_path)
    config.checkpoint.load_best_model_at_end = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "eval_loss": 0.001}\n')
    (tmp_path / "run.json").write_text(f'{{"state": "finished", "step": 20, "best_step": {json.dumps(best)}}}')
    write_model(tmp_path, 1)
    made = build(tmp_path, [model_item(tmp_path, None)])
    (metric,) = header_of(made.text)["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 3.1 / shown
