"""`launcher completion`: verbs, options, groups, keys and values for the Tab key. Imports neither torch nor Hydra."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import EXIT_DONE
from launcher.base.paths import conf_dir
from launcher.config.schema import is_open, valid_keys
from launcher.config.settings import RunConfig

_WITH_OVERRIDES = ("train", "submit", "plan", "preview", "prefetch", "doctor")
_OPTION = re.compile(r"^ +(?:(-\w)(?: \w+)?, )?(--[\w-]+)(?: ([A-Z/_]+|\{[\w,-]+\}))?", re.MULTILINE)

_EXAMPLES = """examples:
  source <(launcher completion bash)                                     in ~/.bashrc
  source <(launcher completion zsh)                                      in ~/.zshrc, after compinit
  launcher completion fish > ~/.config/fish/completions/launcher.fish

Completes verbs, options, groups with their choices, settings and their values; file names everywhere else."""

_BASH = r"""# launcher completion bash
_launcher() {
    local line=${COMP_LINE:0:COMP_POINT} word reply
    word=${line##*[[:space:]]}
    # Readline takes what follows = or : as a word of its own.
    local before=${word%"${word##*[=:]}"}
    COMPREPLY=()
    while IFS= read -r reply; do
        [[ $reply == "$word"* ]] || continue
        [[ $reply == *[=.] ]] && compopt -o nospace
        COMPREPLY+=("${reply#"$before"}")
    done < <(launcher completion --line "$line" 2>/dev/null)
}
complete -o default -F _launcher launcher
"""
_ZSH = r"""# launcher completion zsh
_launcher() {
    local -a found open
    found=("${(@f)$(launcher completion --line "$LBUFFER" 2>/dev/null)}")
    open=(${(M)found:#*[=.]})
    found=(${found:#*[=.]})
    (( $#open )) && compadd -Q -S '' -- $open
    (( $#found )) && compadd -Q -- $found
    (( $#open + $#found )) && return
    compset -P '*='
    _files
}
compdef _launcher launcher
"""
_FISH = r"""# launcher completion fish
complete -c launcher -a '(launcher completion --line (commandline -cp) 2>/dev/null)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def main(argv: list[str]) -> int:
    """Prints a shell's script, or what a line may go on with; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="launcher completion", usage="launcher completion bash|zsh|fish",
        description="The script that makes the Tab key complete launcher's commands.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=tuple(_SCRIPTS), help="the shell that reads the script")
    what.add_argument("--line", metavar="TEXT", help="print what the last word of this line may become (for scripts)")
    options = parser.parse_args(argv)
    if options.shell:
        print(_SCRIPTS[options.shell], end="")
    else:
        print(*candidates(options.line), sep="\n")
    return EXIT_DONE


def candidates(line: str) -> list[str]:
    """The words that the last word of a line may become; none where a file name is to be typed.

    Args:
        line: as far as the cursor, `launcher` first.
    """
    from launcher.cli import VERBS

    *before, word = re.split(r"\s+", line.lstrip())
    if len(before) <= 1:
        return sorted(verb for verb in VERBS if verb.startswith(word)) if before else []
    verb = before[1]
    if verb not in VERBS:
        return []
    if word.startswith("-") or before[-1].startswith("--"):
        names, values = _options(verb)
        known = names if word.startswith("-") else values.get(before[-1])
        if known is not None:
            return [name for name in known if name.startswith(word)]
    if verb == "completion":
        return [shell for shell in _SCRIPTS if shell.startswith(word)]
    if verb not in _WITH_OVERRIDES:
        return []
    folders = [
        conf_dir(),
        Path("conf"),
        *(Path(d) for o, d in itertools.pairwise(before) if o == "--config-dir"),
    ]
    return _overrides(word, _groups(folders))


def _options(verb: str) -> tuple[list[str], dict[str, list[str]]]:
    """The options of a verb and, of those that take a value, what it may be, as its own help tells them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"launcher.cli.{verb}").main(["--help"])
    found = _OPTION.findall(text.getvalue())
    names = sorted({name for short, long, _ in found for name in (short, long) if name})
    values = {long: value.strip("{}").split(",") if "{" in value else [] for _, long, value in found if value}
    return names, values


def _groups(folders: Iterable[Path]) -> dict[str, list[str]]:
    """The choices of each config group, the user's own among them."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            if path.parent != folder:
                found.setdefault(path.parent.relative_to(folder).as_posix(), set()).add(path.stem)
    return {group: sorted(choices) for group, choices in found.items()}


def _overrides(word: str, groups: dict[str, list[str]]) -> list[str]:
    """Keys up to the next dot, and behind an = the values."""
    key, equals, value = word.partition("=")
    plain = key.lstrip("+~")
    signs = key[: len(key) - len(plain)]
    if equals:
        known = groups.get(plain) or _values(plain)
        return [f"{key}={one}" for one in known if one.startswith(value)]
    keys = valid_keys(RunConfig)
    whole = {f"{name}=" for name, hint in keys.items() if not is_dataclass(hint) and not is_open(hint)}
    whole |= {f"{name}." for name, hint in keys.items() if is_open(hint)} | {f"{group}=" for group in groups}
    start = len(plain.rpartition(".")[0]) + 1 if "." in plain else 0
    return sorted({signs + _up_to_dot(name, start) for name in whole if name.startswith(plain)})


def _up_to_dot(name: str, start: int) -> str:
    dot = name.find(".", start)
    return name if dot < 0 else name[: dot + 1]


def _values(key: str) -> list[str]:
    """What a setting can be, where that is a handful of words."""
    found = next((pair for pair in _settings(RunConfig, "") if pair[0] == key), None)
    if found is None:
        return []
    _, setting, hint = found
    if setting.metadata["choices"]:
        return list(setting.metadata["choices"])
    return ["true", "false"] if bool in (hint, *typing.get_args(hint)) else []


def _settings(cls: Any, prefix: str) -> Iterator[tuple[str, Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for setting in fields(cls):
        key, hint = f"{prefix}{setting.name}", hints[setting.name]
        if is_dataclass(hint):
            yield from _settings(hint, f"{key}.")
        else:
            yield key, setting, hint
