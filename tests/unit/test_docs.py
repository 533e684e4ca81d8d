"""README and docs are true: commands run as far as they can without a GPU, a network and a training; files
that are shown compose, links lead somewhere, messages that are explained exist.

What reads a run, and what trains, is in tests/distributed/test_docs.py.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from docs import other_tools
from launcher import cli
from launcher.config.compose import compose_arguments
from launcher.config.settings import RunConfig
from launcher.sweep.plan import make_plan
from tests.documents import PAGES, READING_VERBS, ROOT, Command, blocks, commands, files, write_files

_OTHERS = {"git", "make", "cd", "source", "hf", "pip", "touch", "export"}
_HUB_ID = re.compile(r"=[\w.-]+/[\w.-]+$|openr1_distill|dataset_name=")
_FIRST_PAGES = ("README.md", "SKILL.md", "first-run.md")
_VERBS = [
    pytest.param(c, marks=() if c.page in _FIRST_PAGES else pytest.mark.slow, id=str(c))
    for c in commands() if c.words[0] in ("launcher", "accelerate") and c.verb not in READING_VERBS
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in ("out/checkpoint-500", "their-run/checkpoint-500"):
        (tmp_path / path).mkdir(parents=True)
    for module in [name for name in sys.modules if name in ("squares", "contains", "sign")]:
        del sys.modules[module]
    return tmp_path


@pytest.mark.parametrize("command", _VERBS)
def test_command_runs_when_it_needs_no_run(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(folder, command.page)
    words = list(command.words)
    if words[0] == "accelerate":
        compose_arguments(words[words.index("launcher.train") + 1 :])
        return
    arguments = words[2:]
    started: list[RunConfig] = []
    monkeypatch.setattr("launcher.agent.supervise.run", lambda config, argv, begun: started.append(config) or 0)
    if "--help" in words:
        with pytest.raises(SystemExit) as ended:
            cli.main(words[1:])
        assert ended.value.code == 0
    elif "-m" in arguments:
        overrides = [word for word in arguments if word not in ("-m", "--dry-run")]
        assert make_plan([*overrides, *(["hydra/launcher=slurm"] if command.verb == "submit" else [])], None).swept
    elif command.verb in ("submit", "prefetch", "doctor") and "--dry-run" not in words:
        compose_arguments([word for word in arguments if word not in ("--json", "--fix")])
    elif command.verb in ("plan", "preview") and any(map(_HUB_ID.search, words)):
        compose_arguments([word for word in arguments if "=" in word])
    else:
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
        assert started or command.verb != "train" or "--cfg" in words
        assert capsys.readouterr().out or started


def test_no_page_shows_a_command_that_is_not_tested() -> None:
    for page in PAGES:
        for language in ("", "console", "sh", "shell"):
            for block in blocks(page, language):
                assert not re.search(r"^launcher ", block, re.MULTILINE), f"{page.name}: not marked as bash:\n{block}"
        assert not re.search(r"^    launcher ", page.read_text(), re.MULTILINE), f"{page.name}: an indented command"


def test_commands_are_those_of_launcher_or_well_known() -> None:
    for command in commands():
        assert command.words[0] in {"launcher", "accelerate", *_OTHERS}, str(command)
        assert command.words[0] != "launcher" or command.verb in cli.VERBS, str(command)


def test_readme_lists_every_verb() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"^\| `launcher (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == set(cli.VERBS)
    assert {verb for verb in re.findall(r"`launcher ([a-z]+)\b", text)} <= set(cli.VERBS)


def test_every_verb_that_prints_a_table_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = set(re.findall(r"^\| `(\w+)", (ROOT / "docs/SKILL.md").read_text(), re.MULTILINE))
    for verb in cli.VERBS:
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        if "--json" in capsys.readouterr().out:
            assert verb in told, f"docs/SKILL.md does not say what launcher {verb} --json prints"
            told.discard(verb)
    assert not told & set(cli.VERBS)


@pytest.mark.parametrize("name", [name for name in files() if name.endswith(".yaml")])
def test_experiment_composes_when_it_is_copied(name: str, folder: Path) -> None:
    write_files(folder, f"{name.partition(':')[0]}.md")
    path = folder / name.partition(":")[2]
    path.write_text(files()[name], encoding="utf-8")
    assert compose_arguments([f"experiment={path.stem}"]).data.train_files == ["chat.jsonl"]


def test_python_compiles_and_links_lead_to_files() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8")):
            assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), f"{page.name}: {target}"


@functools.cache
def _texts() -> str:
    """Every text in the source, with … where something is put in."""
    found = []
    for path in (ROOT / "launcher").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_failure_guide_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([^`]{20,})`[^|]*\|[^|]+\|[^|]+\|$", (ROOT / "docs/failures.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for message in rows:
        for part in filter(lambda text: len(text) > 8, map(str.strip, message.split("…"))):
            assert part in _texts() or "CUDA" in part, f"{message}: the code says nothing like {part!r}"


@pytest.mark.parametrize("tool", other_tools.TOOLS)
def test_table_of_another_tool_is_up_to_date_and_composes(
    tool: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / f"docs/from-{tool}.md").read_text(encoding="utf-8")
    assert page == other_tools.filled(page, tool), "run: make docs"
    for override in {o for name, value in other_tools.settings(tool) for o in other_tools.here(name, value)[0]}:
        assert override.partition("=")[0] in _known_keys() or "/" in override, override


@functools.cache
def _known_keys() -> set[str]:
    from launcher.config.schema import is_open, valid_keys

    keys = valid_keys(RunConfig)
    open_keys = [key for key, hint in keys.items() if is_open(hint)]
    typed = {o.partition("=")[0] for t in other_tools.TOOLS for n, v in other_tools.settings(t)
             for o in other_tools.here(n, v)[0]}  # fmt: skip
    return {*keys, *(key for key in typed if any(key.startswith(f"{name}.") for name in open_keys))}


def test_skill_file_has_a_head_that_agents_can_read() -> None:
    head = (ROOT / "docs/SKILL.md").read_text().split("---\n")[1]
    assert re.search(r"^name: launcher$", head, re.MULTILINE) and len(re.search(r"description: (.*)", head)[1]) < 1024  # type: ignore[index]
