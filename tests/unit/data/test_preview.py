"""`launcher preview` shows what is trained on."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from docs import data_page
from launcher.cli import main, preview

from .conftest import chat


def arguments(tmp_path: Path, path: str, *more: str) -> list[str]:
    return [f"data.train_files=[{path}]", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=24", *more]


def test_json_rows_are_the_tokens_and_labels_of_training(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([chat("hi", "yo"), {"text": "plain"}, chat("q", "a" * 50)])
    assert preview.main([*arguments(tmp_path, path), "--json", "--rows", "3"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["source"], r["line"]) for r in rows] == [(path, 1), (path, 2), (path, 3)]
    assert [r["is_truncated"] for r in rows] == [False, False, True]
    first = rows[0]
    assert first["text"] == "<|user|>hi<|end|><|assistant|>yo<|end|>"
    assert first["num_tokens"] == len(first["input_ids"]) == len(first["labels"]) == 8
    assert first["labels"][:5] == [-100] * 5 and first["labels"][5:] == first["input_ids"][5:]
    assert first["num_labelled"] == 3 and rows[2]["num_tokens"] == 24


def test_loss_is_marked_and_the_set_is_described(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([chat("hi", "yo"), chat("q", "a" * 50)])
    assert preview.main([*arguments(tmp_path, path), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{path}:1  8 tokens, 3 with loss" in out and "<|assistant|>⟦yo<|end|>⟧" in out
    assert "2 rows, 32 tokens" in out and "padding 33.3%" in out and "were cut to data.max_length=24" in out
    assert "█" in out


def test_nothing_in_a_row_is_obeyed_by_the_terminal_when_it_is_shown(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "\x1b[31mred\x1b[0m\r\x00\x07\u202egnp.exe\n\t日本"
    path = write_rows([chat("hi", words)])
    wide = arguments(tmp_path, path, "data.max_length=64")
    assert preview.main(wide) == 0
    assert r"⟦\x1b[31mred\x1b[0m\r\x00\x07\u202egnp.exe" + "\n\t日本<|end|>⟧" in capsys.readouterr().out
    assert preview.main([*wide, "--json"]) == 0
    assert words in json.loads(capsys.readouterr().out)[0]["text"]


@pytest.mark.parametrize(("encoding", "errors"), [("ascii", "strict"), ("ascii", "surrogateescape"), ("cp1252", None)])
def test_json_is_exact_when_the_terminal_knows_few_characters(
    write_rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str | None
) -> None:
    path = write_rows([chat("é", "日本😀")])
    for more in ((), ("--json",)):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["preview", *arguments(tmp_path, path), *more]) == 0
        out.seek(0)
        shown = out.read()
        assert more or "<|assistant|>????<|end|>?" in shown
    assert json.loads(shown)[0]["text"] == "<|user|>é<|end|><|assistant|>日本😀<|end|>"


def test_held_out_rows_are_shown_when_the_split_is_eval(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([chat("hi", f"a{i}") for i in range(10)])
    shown = {}
    for split in ("train", "eval"):
        assert (
            preview.main(
                [*arguments(tmp_path, path, "data.eval_split=0.2"), "--json", "--rows", "99", "--split", split]
            )
            == 0
        )
        shown[split] = {row["line"] for row in json.loads(capsys.readouterr().out)}
    assert len(shown["eval"]) == 2 and shown["train"] | shown["eval"] == set(range(1, 11))
    assert not shown["train"] & shown["eval"]


def test_page_of_the_formats_is_up_to_date() -> None:
    assert data_page.TARGET.read_text(encoding="utf-8") == data_page.page(), "run: make docs"
