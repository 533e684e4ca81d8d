"""Writes docs/config.md from the settings' own classes. `make docs`; a test checks that it was done."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from launcher.base.paths import conf_dir
from launcher.config.settings import RunConfig

TARGET = Path(__file__).with_name("config.md")

_HEAD = """# Settings

Written by `make docs` from `launcher/config/settings.py`; the defaults here are those of the classes.
`launcher train --cfg job` shows what a command really uses, with the choices of the groups in it.

A setting is given as `KEY=VALUE`, a choice as `GROUP=CHOICE`. Settings of type *group* are open: any key can be put
below them, under the name that their library gives it (`launch.sbatch.partition=gpu`, `model.peft.r=8`).
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD, "## Groups\n", "| group | choices |", "|---|---|"]
    for group in sorted({path.parent for path in conf_dir().rglob("*.yaml")} - {conf_dir()}):
        choices = ", ".join(f"`{path.stem}`" for path in sorted(group.glob("*.yaml")))
        parts.append(f"| `{group.relative_to(conf_dir()).as_posix()}` | {choices} |")
    parts += ["", "## Settings of the run\n", *_table(RunConfig, "")]
    hints = typing.get_type_hints(RunConfig)
    for setting in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(hints[setting.name]):
            parts += ["", f"## {setting.name}\n", *_table(hints[setting.name], f"{setting.name}.")]
    return "\n".join(parts) + "\n"


def _table(cls: type, prefix: str) -> list[str]:
    hints = typing.get_type_hints(cls)
    rows = [
        f"| `{prefix}{f.name}` | {_type(hints[f.name], f.metadata)} | `{_default(f)}` | {_escaped(f.metadata['doc'])} |"
        for f in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[f.name])
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _type(hint: Any, meta: typing.Mapping[str, Any]) -> str:
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    names = {int: "integer", float: "number", str: "text", bool: "true, false", list: "list", dict: "group"}
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) in (list, dict):
        kinds = [hint]
    text = " or ".join(names[typing.get_origin(kind) or kind] for kind in kinds)
    return text if meta["minimum"] is None else f"{text}, at least {meta['minimum']:g}"


def _default(setting: dataclasses.Field[Any]) -> str:
    if setting.default_factory is not dataclasses.MISSING:
        return json.dumps(setting.default_factory())
    return setting.default if isinstance(setting.default, str) else json.dumps(setting.default)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
