"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, how it stands, and the command or setting that mends it."""

    name: str
    status: str
    text: str
    fix: str | None = None
