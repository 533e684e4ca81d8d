"""What is printed where a terminal or pipe is not like others: narrow, ASCII alone."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from launcher.base.tables import print_whole
from launcher.cli import main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_replaced_when_it_is_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["--help"]) == 0
    assert main(["completion", "bash"]) == 0
    print("⟦ → ← … 漢")
    out.seek(0)
    assert "usage: launcher VERB" in out.read()


@pytest.mark.parametrize("columns", ["10", "40", "80", "200"])
def test_cells_stay_whole_when_the_terminal_is_narrow(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table = Table(box=None, pad_edge=False)
    cells = ["zero3_offload ←", "a name of several words [bold]", "19.99 GB", "yes"] * 2
    for i in range(len(cells)):
        table.add_column(f"column {i}")
    table.add_row(*cells)
    print_whole(table)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert all(cell in shown[1] for cell in cells)


def test_a_repository_is_refused_when_its_name_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "--dry-run", "--repo-id", "a b"]) == 2
    assert "--repo-id must be ORG/NAME (got 'a b')" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["plan", "train", "report"])
def test_help_of_a_verb_is_shown_when_it_is_asked_for_as_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", verb])
    assert ended.value.code == 0
    assert f"launcher {verb}" in capsys.readouterr().out
