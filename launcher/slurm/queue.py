"""Questions to Slurm. About many jobs at once: one for all, since a cluster minds a thousand."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from launcher.base import files
from launcher.base.errors import SlurmUnavailableError
from launcher.base.paths import RunPaths

_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
_NO_ANSWER = ("Unable to contact slurm controller", "Socket timed out", "Could not establish a configuration source",
              "Protocol authentication error", "Zero Bytes were transmitted")  # fmt: skip


def ask_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands; its refusals are the caller's to read.

    Raises:
        SlurmUnavailableError: it is not installed here, or the controller does not answer.
    """
    if shutil.which(command[0]) is None:
        raise SlurmUnavailableError(
            f"{command[0]} was not found: no Slurm on this machine. Submit from a login node of the cluster; "
            "--dry-run needs no Slurm"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and any(text in done.stderr for text in _NO_ANSWER):
        raise SlurmUnavailableError(f"Slurm does not answer:\n{done.stderr.strip()}")
    return done


def submitted_id(run_dir: Path) -> str | None:
    """The job, ARRAY_TASK in an array, that was last submitted for a folder."""
    try:
        text = files.read_text(RunPaths(run_dir).slurm_dir / "job_id", within=run_dir).strip()
    except (OSError, ValueError):
        return None
    return text if _JOB_ID.fullmatch(text) else None  # squeue would refuse it, and with it all others


def live_jobs(run_dirs: Iterable[Path]) -> dict[Path, str]:
    """The folders whose job is queued or running, and its id.

    Raises:
        SlurmUnavailableError: Slurm does not answer.
    """
    ids = {run_dir: job_id for run_dir in run_dirs if (job_id := submitted_id(run_dir)) is not None}
    if not ids:
        return {}
    bases = ",".join(sorted({job_id.partition("_")[0] for job_id in ids.values()}))
    answer = ask_slurm("squeue", "--noheader", "--array", "--format=%i", f"--jobs={bases}")
    queued = set(answer.stdout.split()) if answer.returncode == 0 else set()  # it refuses a single id it has forgotten
    return {run_dir: job_id for run_dir, job_id in ids.items() if job_id in queued}


def job_states(run_dirs: Iterable[Path]) -> dict[Path, tuple[str, str, str]]:
    """(job, state, reason) as squeue says, of the folders whose job it still knows; none where there is no Slurm."""
    ids = {run_dir: job_id for run_dir in run_dirs if (job_id := submitted_id(run_dir)) is not None}
    if not ids or shutil.which("squeue") is None:
        return {}
    bases = ",".join(sorted({job_id.partition("_")[0] for job_id in ids.values()}))
    try:
        answer = ask_slurm("squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={bases}")
    except SlurmUnavailableError:
        return {}
    known = {parts[0]: parts for line in answer.stdout.splitlines() if len(parts := line.strip().split("|", 2)) == 3}
    return {run_dir: (job_id, known[job_id][1], known[job_id][2]) for run_dir, job_id in ids.items() if job_id in known}


def cancel(job_ids: Iterable[str], *, only_pending: bool) -> None:
    """Takes jobs out of the queue; those that run are killed unless `only_pending`.

    Raises:
        SlurmUnavailableError: Slurm does not answer.
    """
    ids = sorted(job_ids)
    for first in range(0, len(ids), 100):  # an argument list has its limits
        ask_slurm("scancel", *(["--state=PENDING"] if only_pending else []), *ids[first : first + 100])
