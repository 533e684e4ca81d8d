"""The manifest finds every kind of damage, its own included."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base import manifest
from launcher.base.errors import DamagedCheckpointError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with chunks of 1000 bytes: files of none, one, and several, and one of exactly two."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 1000)
    made = tmp_path / "checkpoint-7"
    (made / "state").mkdir(parents=True)
    source = random.Random(1)
    for name, size in {"empty": 0, "small.json": 11, "two": 2000, "state/many": 3500}.items():
        (made / name).write_bytes(source.randbytes(size))
    built = manifest.build(made, step=7, world_size=2, zero_stage=3)
    (made / manifest.NAME).write_bytes(built.to_json())
    return made


def test_manifest_is_read_back_as_it_was_written(folder: Path) -> None:
    found = manifest.read(folder)
    assert (found.step, found.world_size, found.zero_stage) == (7, 2, 3)
    assert {f.path: f.bytes for f in found.files} == {"empty": 0, "small.json": 11, "two": 2000, "state/many": 3500}
    assert {f.path: len(f.chunk_sha256) for f in found.files} == {
        "empty": 0,
        "small.json": 1,
        "two": 2,
        "state/many": 4,
    }
    assert found.total_bytes == 5511
    assert manifest.verify(folder) == []


@pytest.mark.parametrize("name", ["small.json", "two", "state/many", manifest.NAME])
def test_verify_finds_one_flipped_bit_at_any_position(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    source = random.Random(2)
    positions = (
        range(len(good)) if name == manifest.NAME else sorted(source.sample(range(len(good)), min(len(good), 60)))
    )
    missed = []
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << source.randrange(8)
        path.write_bytes(bad)
        if manifest.verify(folder) == [] or manifest.is_newer_format(folder):
            missed.append((position, bytes(bad[position : position + 20])))
    assert missed == []
    path.write_bytes(good)
    assert manifest.verify(folder) == []


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_version_is_damage_and_not_a_newer_version(folder: Path, bit: int) -> None:
    path = folder / manifest.NAME
    good = path.read_bytes()
    position = good.index(b'"format_version": 2') + len(b'"format_version": ')
    bad = bytearray(good)
    bad[position] ^= 1 << bit
    path.write_bytes(bad)
    assert manifest.verify(folder) != []
    assert not manifest.is_newer_format(folder)


@pytest.mark.parametrize("name", ["small.json", "two", "state/many", manifest.NAME])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_verify_finds_a_truncated_file(folder: Path, name: str, keep: float) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: max(0, int(path.stat().st_size * keep) - 1)])
    problems = manifest.verify(folder)
    assert len(problems) == 1 and name in problems[0]


def test_verify_finds_a_longer_file_and_a_missing_one(folder: Path) -> None:
    (folder / "empty").write_bytes(b"x")
    (folder / "two").unlink()
    assert manifest.verify(folder) == ["empty has 1 bytes instead of 0", "two is missing"]


def test_every_share_of_the_reading_together_covers_every_byte(folder: Path) -> None:
    data = bytearray((folder / "state/many").read_bytes())
    data[3400] ^= 1
    (folder / "state/many").write_bytes(data)
    found = [manifest.verify(folder, share, 3) for share in range(3)]
    assert sum(map(len, found)) == 1


def test_unknown_files_are_named_and_no_damage(folder: Path) -> None:
    (folder / "state/planted.pkl").write_bytes(b"cos\nsystem\n")
    assert manifest.verify(folder) == []
    assert manifest.unknown_files(folder, manifest.read(folder)) == ["state/planted.pkl"]


@pytest.mark.parametrize("version", [3, 99])
def test_a_newer_format_is_refused_with_the_line_that_mends_it(folder: Path, version: int) -> None:
    raw = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps({**raw, "format_version": version, "later": True}))
    assert manifest.is_newer_format(folder)
    with pytest.raises(DamagedCheckpointError, match="pip install --upgrade accelerate-launcher"):
        manifest.read(folder)


@pytest.mark.parametrize("path", ["/etc/passwd", "../run.json", "state/../../run.json"])
def test_a_manifest_that_names_files_elsewhere_is_refused(folder: Path, path: str) -> None:
    made = manifest.read(folder)
    entry = manifest.FileEntry(path, 0, "0" * 64, ())
    bad = manifest.Manifest(made.step, made.world_size, made.zero_stage, (*made.files, entry))
    (folder / manifest.NAME).write_bytes(bad.to_json())
    assert "outside its folder" in manifest.verify(folder)[0]


def test_a_manifest_without_its_own_hash_is_read(folder: Path) -> None:
    """The contract's fields alone are enough."""
    raw = json.loads((folder / manifest.NAME).read_text())
    del raw["manifest_sha256"]
    (folder / manifest.NAME).write_text(json.dumps(raw))
    assert manifest.verify(folder) == []


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and gives it a hash that fits, as somebody would who means harm."""
    path = folder / manifest.NAME
    raw = json.loads(path.read_text())
    del raw["manifest_sha256"]
    change(raw)
    own_hash = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**raw, "manifest_sha256": own_hash}) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(step=float("inf")),
        lambda raw: raw.update(step=-1),
        lambda raw: raw.update(step=10**4000),
        lambda raw: raw.update(step="7"),
        lambda raw: raw.update(step=True),
        lambda raw: raw.update(world_size=0),
        lambda raw: raw.update(zero_stage=4),
        lambda raw: raw.update(format="other"),
        lambda raw: raw.update(format_version=0),
        lambda raw: raw.update(format_version=10**9),
        lambda raw: raw.update(files=None),
        lambda raw: raw.update(files={"a": 1}),
        lambda raw: raw.update(files=[[]]),
        lambda raw: raw["files"].append(raw["files"][0]),
        lambda raw: raw["files"][2].update(bytes=-5),
        lambda raw: raw["files"][2].update(bytes=2.5),
        lambda raw: raw["files"][2].update(bytes=10**30),
        lambda raw: raw["files"][2].update(chunk_sha256=[]),
        lambda raw: raw["files"][2].update(chunk_sha256=["x" * 64] * 2),
        lambda raw: raw["files"][2].update(sha256=None),
        lambda raw: raw["files"][2].update(path="manifest.json"),
        lambda raw: raw["files"][2].update(path="./two"),
        lambda raw: raw["files"][2].update(path="a\0b"),
        lambda raw: raw["files"][2].update(path=["two"]),
        lambda raw: raw["files"][2].update(path=""),
    ],
)  # fmt: skip
def test_a_manifest_with_a_hash_that_fits_is_damaged_when_it_holds_nonsense(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewritten(folder, change)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be read"):
        manifest.read(folder)
    assert len(manifest.verify(folder)) == 1 and not manifest.is_newer_format(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "null", "[]", '{"format_version": "\\ud800"}', "\xff"])
def test_a_manifest_that_is_none_is_damaged(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be read"):
        manifest.read(folder)


@pytest.mark.parametrize("name", ["two", "state", "state/many", manifest.NAME])
def test_a_link_in_a_checkpoint_is_damage_even_when_what_it_leads_to_is_right(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert any("link" in problem for problem in manifest.verify(folder))


@pytest.mark.parametrize("name", ["two", manifest.NAME])
def test_a_pipe_in_a_checkpoint_is_damage_and_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert any("is a pipe" in problem for problem in manifest.verify(folder))


def test_a_link_that_appears_during_a_save_is_not_taken_into_the_manifest(folder: Path) -> None:
    (folder.parent / "private").write_text("secret")
    (folder / "extra.json").symlink_to(folder.parent / "private")
    with pytest.raises(OSError, match="is a link"):
        manifest.build(folder, step=7, world_size=1, zero_stage=0)


def test_every_file_has_a_role() -> None:
    roles = {
        "weights": ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                    "adapter_model.safetensors"),
        "model": ("config.json", "tokenizer.json", "adapter_config.json", "chat_templates/a.jinja"),
        "state": ("state/state.json", "state/optimizer.safetensors", "trainer_state.json", "manifest.json"),
        "card": ("README.md",),
    }  # fmt: skip
    assert {role: tuple(p for p in paths if manifest.role_of(p) == role) for role, paths in roles.items()} == roles
