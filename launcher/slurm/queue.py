"""What Slurm's queue says about many jobs at once: one question for all, since a cluster minds a thousand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launcher.paths import RunPaths
from launcher.slurm.submit import _slurm


def submitted_id(run_dir: Path) -> str | None:
    """The job, ARRAY_TASK in an array, that was last submitted for a folder."""
    try:
        return (RunPaths(run_dir).slurm_dir / "job_id").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def live_jobs(run_dirs: Iterable[Path]) -> dict[Path, str]:
    """The folders whose job is queued or running, and its id.

    Raises:
        SlurmUnavailableError: Slurm does not answer.
    """
    ids = {run_dir: job_id for run_dir in run_dirs if (job_id := submitted_id(run_dir)) is not None}
    if not ids:
        return {}
    bases = ",".join(sorted({job_id.partition("_")[0] for job_id in ids.values()}))
    answer = _slurm("squeue", "--noheader", "--array", "--format=%i", f"--jobs={bases}")
    queued = set(answer.stdout.split()) if answer.returncode == 0 else set()  # it refuses a single id it has forgotten
    return {run_dir: job_id for run_dir, job_id in ids.items() if job_id in queued}


def cancel(job_ids: Iterable[str], *, only_pending: bool) -> None:
    """Takes jobs out of the queue; those that run are killed unless `only_pending`.

    Raises:
        SlurmUnavailableError: Slurm does not answer.
    """
    ids = sorted(job_ids)
    for first in range(0, len(ids), 100):  # an argument list has its limits
        _slurm("scancel", *(["--state=PENDING"] if only_pending else []), *ids[first : first + 100])
