"""What a failed rank leaves behind (`error-rank-N.json`), and which of several failed first. Standard library only."""

from __future__ import annotations

import json
import os
import re
import sysconfig
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from launcher.base import files
from launcher.base.errors import EXIT_FAILED, LauncherError
from launcher.base.process import host
from launcher.base.secrets import redacted

ATTEMPT = "LAUNCHER_ATTEMPT"
"""Environment variable: the id of this start of the ranks, the same on every machine."""
_NAME = "error-rank-{}.json"
_ECHO_S = 2.0
"""A peer's own error may be reported so much after the loss of its connection: reports travel between machines."""
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PRODUCT = str(Path(__file__).resolve().parents[1])
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/graph.py")
_LOST = re.compile(
    r"(closed|reset|refused|aborted) by (the )?(remote )?peer"
    r"|connection (was likely closed|closed|reset|refused|aborted)"
    r"|broken pipe|remote process exit|ncclRemoteError|tim(ed|e) ?out|no route to host|socket closed",
    re.IGNORECASE,
)


class Report(TypedDict):
    """The failure of one rank. `where` is the innermost line of the user's code, else of any."""

    rank: int
    host: str
    time: float
    attempt: str | None
    exit_code: int
    kind: str
    is_ours: bool
    message: str
    training_began: bool
    step: int | None
    where: str
    is_users_code: bool
    traceback: list[str]


def is_library(file: str) -> bool:
    """Whether a source file belongs to Python or to something installed."""
    return file.startswith((*_LIBRARIES, "<"))


def where_raised(error: BaseException) -> tuple[str, bool]:
    """`FILE:LINE in FUNCTION` of the innermost frame of the user's own code, else of any; whether it is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, _PRODUCT, "<"))]
    innermost = (own or frames)[-1] if frames else None
    return f"{innermost.filename}:{innermost.lineno} in {innermost.name}" if innermost else "", bool(own)


def make_report(error: BaseException, *, rank: int, training_began: bool, step: int | None) -> Report:
    """Describes what ended this rank. `step`: how many steps it had done."""
    where, is_users_code = where_raised(error)
    message = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
    return Report(
        rank=rank, host=host(), time=time.time(), attempt=os.environ.get(ATTEMPT),
        exit_code=error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED,
        kind=type(error).__name__, is_ours=isinstance(error, LauncherError),
        message=redacted(message), training_began=training_began, step=step,
        where=where, is_users_code=is_users_code,
        traceback=redacted("".join(traceback.format_exception(error))).splitlines(),
    )  # fmt: skip


def write_report(report: Report, folder: Path) -> None:
    """Writes error-rank-N.json; that of an earlier failure stays beside it, as error-rank-N.1.json and so on."""
    path = folder / _NAME.format(report["rank"])
    if path.exists():
        taken = [int(p.name.split(".")[1]) for p in folder.glob(f"{path.stem}.*.json")]
        path.rename(path.with_name(f"{path.stem}.{max(taken, default=0) + 1}.json"))
    files.replace_file(path, json.dumps(report, indent=1).encode())


def read_reports(folder: Path) -> list[Report]:
    """The newest report of each rank; what is no report is left out."""
    paths = [path for path in sorted(folder.glob("error-rank-*.json")) if "." not in path.stem]
    read = [files.read_json_or(path, None) for path in paths]
    return [_with_defaults(value) for value in read if isinstance(value, dict) and "rank" in value]


def _with_defaults(value: dict[str, Any]) -> Report:
    known: dict[str, Any] = {
        "host": "", "time": 0.0, "attempt": None, "exit_code": EXIT_FAILED, "kind": "", "is_ours": False, "message": "",
        "training_began": False, "step": None, "where": "", "is_users_code": False, "traceback": [],
    }  # fmt: skip
    report: Report = {**known, **value}  # type: ignore[typeddict-item]
    return report


def is_connection_loss(report: Report) -> bool:
    """Whether a collective told that it had lost a peer. The same words from elsewhere are an error like any other."""
    if report["is_ours"] or not _LOST.search(report["message"]):
        return False
    raised_in = [line for line in report["traceback"] if line.lstrip().startswith("File ")][-4:]
    return (
        report["kind"].startswith("Dist")  # torch's DistBackendError, DistNetworkError, DistStoreError
        or "gloo/transport" in report["message"]
        or any(room in line for line in raised_in for room in _COLLECTIVES)
    )


def first_failure(reports: Sequence[Report], *, has_silent_death: bool) -> Report | None:
    """The failure that came first; a rank that only noticed the end of a peer is passed over.

    Args:
        reports: of one attempt, times on one clock.
        has_silent_death: a rank was killed, or ended without a report: lost connections are its echo.

    Returns:
        None where all reports are echoes of a silent death, or where there are none. Where nobody else failed, the
        earliest lost connection is what is known.
    """
    ordered = sorted(reports, key=lambda report: report["time"])
    causes = [report for report in ordered if not is_connection_loss(report)]
    if not ordered or (not causes and has_silent_death):
        return None
    if causes and (has_silent_death or causes[0]["time"] <= ordered[0]["time"] + _ECHO_S):
        return causes[0]
    return ordered[0]


def in_words(report: Report, logs_dir: Path) -> str:
    """What a user reads: which rank, where it was, its error and the line, and where the traceback is."""
    if report["is_ours"]:
        return report["message"]
    place = f" on {report['host']}" if report["host"] else ""
    line = f"\n  at {report['where']}" if report["where"] else ""
    path = logs_dir / _NAME.format(report["rank"])
    return f"rank {report['rank']}{place}: {report['kind']}: {report['message']}{line}\n  traceback: {path}"
