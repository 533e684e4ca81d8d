"""The commands of the README are true: they compose, their verbs exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher import cli
from launcher.config.compose import compose_arguments
from launcher.sweep.plan import make_plan

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    inline = [
        shlex.split(text) for text in re.findall(r"`((?:launcher|HF_HUB_OFFLINE=1 launcher) train [^`…]*)`", _README)
    ]
    return [w for w in [*words, *inline] if w]


def arguments_of(command: list[str]) -> list[str] | None:
    """The overrides of a command that composes, else None."""
    if command[:2] in (["launcher", "train"], ["launcher", "submit"], ["launcher", "prefetch"]):
        return [word for word in command[2:] if word not in ("-m", "--dry-run", "--cfg", "job")]
    if command[:2] == ["accelerate", "launch"]:
        return command[command.index("launcher.train") + 1 :]
    return None


@pytest.fixture(autouse=True)
def _files_that_the_readme_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text('{"text": "one"}\n')
    Path("conf/experiment").mkdir(parents=True)
    (experiment,) = blocks("yaml")
    Path("conf/experiment/mine.yaml").write_text(experiment)


@pytest.mark.parametrize("command", [c for c in commands() if arguments_of(c) is not None], ids=" ".join)
def test_command_composes(command: list[str]) -> None:
    arguments = arguments_of(command)
    assert arguments is not None
    if "-m" in command[:3] and command[0] == "launcher":
        assert len(list(make_plan(arguments, None).swept)) == 2
    else:
        compose_arguments(arguments)


def test_experiment_of_the_readme_composes() -> None:
    assert compose_arguments(["experiment=mine"]).data.train_files == ["chat.jsonl"]


def test_verbs_exist_and_all_are_in_the_table() -> None:
    assert {c[1] for c in commands() if c[0] == "launcher"} <= set(cli.VERBS)
    assert set(re.findall(r"^\| `launcher (\w+)", _README, re.MULTILINE)) == set(cli.VERBS)


def test_targets_of_make_exist() -> None:
    makefile = (_ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", _README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", _README):
        assert (_ROOT / target).exists(), target
