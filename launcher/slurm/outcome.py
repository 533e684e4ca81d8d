"""How one start of the ranks ended: the batch script asks, acts on the answer, and run.json is completed. No torch.

`python -m launcher.slurm.outcome RUN_DIR --attempt ID --began SECONDS --code N` prints one of
`finished`, `pruned`, `interrupted REASON`, `unsaved REASON` (stopped on request, and its save failed), `failed CODE`
(an error of the user's input, or one that a restart does not cure), `crashed`; why, on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.end_report import write_end_report
from launcher.base.errors import EXIT_FAILED, EXIT_STOPPED
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.base.process import host
from launcher.base.rank_reports import first_failure, in_words, read_reports
from launcher.base.stop_requests import read_stop, remove_stop
from launcher.base.timeline import note_ended


def judge(paths: RunPaths, *, attempt: str, began: float, code: int, error_dir: Path) -> tuple[str, str]:
    """The verdict and its explanation. run.json is the authority where this attempt has ended it.

    Where it has not, the ranks were killed or failed: run.json is completed here. A start that had been asked to stop
    counts as interrupted: what killed it is what asked for the stop.

    Args:
        attempt: LAUNCHER_ATTEMPT of this start.
        began: seconds since the epoch.
        code: what srun ended with; only for the explanation.
        error_dir: the ranks' reports.
    """
    run = files.read_json_or(paths.run_state, {})
    if run.get("attempt") == attempt and run["state"] == "interrupted" and run.get("exit_code") == EXIT_FAILED:
        return _unsaved(paths, run)
    if run.get("attempt") == attempt and run["state"] in ("finished", "pruned", "interrupted"):
        return " ".join(filter(None, (run["state"], run.get("reason")))), ""
    error = first_failure(read_reports(error_dir), has_silent_death=_has_hung(paths, began))
    if code == 0 and error is None and run.get("state") == "finished":
        return "finished", ""  # before this start; the ranks found nothing to do
    if (asked := _asked(paths)) is not None:
        _complete(paths, run, state="pruned" if asked == "pruned" else "interrupted", exit_code=EXIT_STOPPED,
                  reason=None if asked == "pruned" else asked)  # fmt: skip
        return ("pruned" if asked == "pruned" else f"interrupted {asked}"), "ended before the ranks could save"
    if error is not None and error["is_ours"]:
        _complete(paths, run, state="failed", reason=None, exit_code=error["exit_code"], error=error["message"])
        return f"failed {error['exit_code']}", error["message"]
    if _has_hung(paths, began):
        reason = "hang"
        text = f"no step for launch.hang_timeout_s; where each process stood is in {paths.logs_dir}/stacks-rank-*.txt"
    else:
        reason = "crash"
        text = f"a process was killed from outside (out of memory?); srun ended with {code}"
        text = in_words(error, paths.logs_dir) if error is not None else text
    _complete(paths, run, state="failed", reason=reason, exit_code=EXIT_FAILED, error=text)
    return "crashed", text


def _unsaved(paths: RunPaths, run: dict[str, Any]) -> tuple[str, str]:
    """Of a stop whose save failed: the job may go on from the checkpoint before, but not lose the same steps for ever.

    slurm/unsaved.json holds the newest checkpoint's step. Where it was the same at such a stop before, or where the
    disk does not even take this note, the job ends.
    """
    note, told = paths.slurm_dir / "unsaved.json", str(run.get("error"))
    steps = [step for step, folder in paths.checkpoint_dirs() if CheckpointPaths(folder).manifest.is_file()]
    now = {"newest_checkpoint": max(steps, default=0)}
    try:
        if files.read_json_or(note, {}) != now:
            files.write_json(note, now)
            return f"unsaved {run.get('reason')}", told
        why = f"{told}. It was the same at the stop before, and no checkpoint has come since: not requeued"
    except OSError as error:
        why = f"{told}. Nothing can be written to {paths.root}: {error}; not requeued"
    _complete(paths, run, state="failed", reason=None, exit_code=EXIT_FAILED, error=why)
    return f"failed {EXIT_FAILED}", why


def _asked(paths: RunPaths) -> str | None:
    """The reason in the STOP file, which is removed: the ranks did not live to obey it."""
    reason = read_stop(paths.stop_file)
    if reason is not None:
        remove_stop(paths.stop_file)
    return reason


def _has_hung(paths: RunPaths, began: float) -> bool:
    stacks = [p.stat() for p in paths.logs_dir.glob("stacks-rank-*.txt")]
    return any(stat.st_size and stat.st_mtime >= began for stat in stacks)


def _complete(paths: RunPaths, run: dict[str, Any], **fields: Any) -> None:
    known = {"host": host(), "job_id": os.environ.get("SLURM_JOB_ID"), "step": 0, "updated_at": time.time()}
    with contextlib.suppress(OSError):  # a full disk
        files.write_json(paths.run_state, {**known, **run, **fields})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.slurm.outcome")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--code", type=int, required=True)
    given = parser.parse_args()
    verdict, why = judge(
        RunPaths(given.run_dir), attempt=given.attempt, began=given.began, code=given.code,
        error_dir=Path(os.environ["LAUNCHER_ERROR_DIR"]),
    )  # fmt: skip
    state, _, reason = verdict.partition(" ")
    if state in ("crashed", "failed"):
        state, reason = "failed", "crash" if state == "crashed" else ""
    ended = {"state": state, "reason": reason or None, "text": why}
    note_ended(RunPaths(given.run_dir), given.attempt, given.began, ended)
    write_end_report(given.run_dir)
    if why:
        print(f"launcher: {why}", file=sys.stderr)
    print(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
