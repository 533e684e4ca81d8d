"""The card's YAML header: only what is known, checked here for what the Hub would refuse."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

# Source: the list in the Hub's documentation, "Repository licenses".
LICENSES = frozenset((Path(__file__).with_name("licenses.txt")).read_text(encoding="utf-8").split())
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_LANGUAGE = re.compile(r"^([a-z]{2,3}|code|multilingual)$")


def is_hub_id(name: Any) -> bool:
    """Whether a name can be a repository's; a local path as base_model or dataset makes the Hub refuse the card."""
    return isinstance(name, str) and bool(_HUB_ID.match(name)) and ".." not in name and "--" not in name


def checked_license(name: str) -> tuple[dict[str, str], str | None]:
    """The header's entries for a license, and what to tell the user if the Hub does not know it."""
    wanted = name.strip().lower()
    if wanted in LICENSES:
        return {"license": wanted}, None
    close = difflib.get_close_matches(wanted, sorted(LICENSES), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    slug = re.sub(r"[^a-z0-9.+-]+", "-", wanted).strip("-") or "custom"
    notice = f"hub.license={name} is not one of the Hub's licenses; the card says other ({slug}).{hint}"
    return {"license": "other", "license_name": slug}, notice


def checked_languages(names: list[str]) -> tuple[list[str], str | None]:
    """Language codes that the Hub accepts, and what to tell about the others."""
    good = [n for n in names if _LANGUAGE.match(n)]
    bad = [n for n in names if n not in good]
    notice = f"hub.language={bad} left out of the card: the Hub takes ISO 639 codes such as en" if bad else None
    return good, notice


def merge(theirs: dict[str, Any], ours: dict[str, Any], sent_last: dict[str, Any]) -> dict[str, Any]:
    """What stands in the header wins over ours, unless it is exactly what we sent last."""
    merged = dict(theirs)
    for key, value in ours.items():
        if key not in theirs or theirs[key] == sent_last.get(key) or key == "model-index":
            merged[key] = value
    for key, value in sent_last.items():
        if key not in ours and theirs.get(key) == value:
            del merged[key]
    return merged
