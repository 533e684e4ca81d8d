"""What failed ranks leave behind (`error-rank-N.json`), and which of them failed first. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import RankFailedError


def earliest_error(folder: Path) -> RankFailedError | None:
    """The first failure among the ranks' reports; None where they only noticed that a peer had gone."""
    reports = [r for p in folder.glob("error-rank-*.json") if (r := files.read_json_or(p, None)) and not _is_echo(r)]
    if not reports:
        return None
    first = min(reports, key=lambda r: float(r["time"]))
    error = RankFailedError(
        first["message"] if first["is_ours"] else f"rank {first['rank']}: {first['kind']}: {first['message']}"
    )
    error.exit_code, error.report = first["exit_code"], first
    return error


def _is_echo(report: dict[str, Any]) -> bool:
    """A process that only noticed that a peer had gone."""
    text = report["message"].lower() if not report["is_ours"] else ""
    return any(w in text for w in ("connection closed by peer", "connection reset", "broken pipe", "nccl", "timed out"))
