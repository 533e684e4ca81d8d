"""How one start of the ranks ended, on all machines, what run.json says of it, and whether another start may help."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.agent.machine import Ended, Verdict
from launcher.base import files, json_lines
from launcher.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, RunLockedError
from launcher.base.full_disk import rewrite_json
from launcher.base.paths import RunPaths
from launcher.base.process import host
from launcher.base.rank_reports import Report, first_failure, in_words, is_connection_loss
from launcher.base.stop_requests import read_stop, remove_stop
from launcher.hub import pending_uploads


@dataclass(frozen=True)
class Outcome:
    """As in run.json. `failure` is the report of the rank that failed first, where one was left."""

    state: str
    reason: str | None
    exit_code: int
    text: str = ""
    failure: Report | None = None
    is_lost: bool = False
    """The agent of a machine has gone: those that are left cannot start the run again."""


def judge(paths: RunPaths, attempt: str, machines: Sequence[Ended], *, is_killed: bool = False) -> Outcome:
    """Reads how it ended; run.json is the authority where the ranks have ended it, else it is completed here.

    Args:
        attempt: the id of this start.
        is_killed: somebody asked to end it at once.
    """
    run = files.read_json_or(paths.run_state, {})
    is_mine = run.get("attempt") == attempt
    asked = _asked(paths)
    if (known := told_by_ranks(paths, attempt)) is not None:
        is_cut_off = known.state == "finished" and any(ended.code for ended in machines)
        text = "the run is finished; its last process was ended before it had sent everything to the Hub"
        return replace(known, text=text) if is_cut_off and pending_uploads(paths) else known
    outcome = _failed(paths, machines, asked, is_killed=is_killed)
    _complete(paths, run if is_mine else {}, run, attempt, outcome, machines)
    return outcome


def told_by_ranks(paths: RunPaths, attempt: str) -> Outcome | None:
    """How the ranks themselves have ended this start, as run.json says; None where they have not."""
    run = files.read_json_or(paths.run_state, {})
    if run.get("attempt") != attempt:
        return None
    if run.get("state") == "finished":
        return Outcome("finished", None, EXIT_DONE)
    if run.get("state") in ("interrupted", "pruned"):
        if run.get("exit_code") == EXIT_FAILED:  # stopped on request, and its save failed
            return Outcome(run["state"], run.get("reason"), EXIT_FAILED, str(run.get("error")))
        return Outcome(run["state"], run.get("reason"), EXIT_STOPPED)
    return None


def _failed(paths: RunPaths, machines: Sequence[Ended], asked: str | None, *, is_killed: bool) -> Outcome:
    if is_killed:
        return Outcome("interrupted", "signal", EXIT_FAILED, "killed at once, as asked; what was saved before is whole")
    lost = next((ended for ended in machines if ended.is_lost), None)
    reports = [report for ended in machines for report in ended.reports]
    hung = {rank: (ended.host, *stood) for ended in machines for rank, stood in ended.hung.items()}
    killed = {rank: (ended.host, number) for ended in machines for rank, number in ended.killed.items()}
    stopped = {rank: (ended.host, pid) for ended in machines for rank, pid in ended.stopped.items()}
    first = first_failure(reports, has_silent_death=bool(hung or killed or lost or stopped))
    if asked is not None and (first is None or first["exit_code"] != EXIT_USER):
        state, reason = ("pruned", None) if asked == "pruned" else ("interrupted", asked)
        return Outcome(state, reason, EXIT_STOPPED, "ended before it could save; what was saved before is whole", first)
    if first is not None:
        reason = None if first["is_ours"] else "crash"
        return Outcome("failed", reason, first["exit_code"], in_words(first, paths.logs_dir), first, lost is not None)
    if lost is not None:
        text = f"the agent of machine {lost.machine} on {lost.host} has gone: it was killed, or the network is down"
        return Outcome("failed", "crash", EXIT_FAILED, text, is_lost=True)
    if stopped:
        return Outcome("failed", "hang", EXIT_FAILED, _stop_in_words(stopped))
    if hung:
        return Outcome("failed", "hang", EXIT_FAILED, _hang_in_words(hung, paths))
    if killed:
        return Outcome("failed", "crash", EXIT_FAILED, _kill_in_words(killed, paths))
    return Outcome("failed", "crash", EXIT_FAILED, _unexplained(machines, paths))


def _hang_in_words(hung: dict[int, tuple[str, bool, str]], paths: RunPaths) -> str:
    """Those that wait for others in a collective are not to blame, as far as one can tell."""
    to_blame = sorted(rank for rank, (_, is_waiting, _) in hung.items() if not is_waiting)
    lines = []
    for rank in to_blame or sorted(hung):
        where, is_waiting, place = hung[rank]
        did = "waited for the others" if is_waiting else "stood"
        lines.append(
            f"rank {rank} on {where}: no step for launch.hang_timeout_s; it {did} in {place}. All its threads: "
            f"{paths.stacks(rank)}"
        )
    if waiting := sorted(set(hung) - set(to_blame)) if to_blame else []:
        lines.append(f"rank{'s' * (len(waiting) > 1)} {', '.join(map(str, waiting))} waited for it")
    return "\n  ".join(lines)


def _stop_in_words(stopped: dict[int, tuple[str, int]]) -> str:
    return "\n  ".join(
        f"rank {rank} on {where} (pid {pid}) was stopped by a signal (SIGSTOP, Ctrl-Z), and nothing let it go on"
        for rank, (where, pid) in sorted(stopped.items())
    )


def _kill_in_words(killed: dict[int, tuple[str, int]], paths: RunPaths) -> str:
    rank, (where, number) = max(killed.items(), key=lambda item: (item[1][1] == 9, -item[0]))
    cause = " (out of memory?)" if number == 9 else f"; its output is in {paths.rank_log(rank)}" if rank else ""
    return f"rank {rank} on {where} was killed by signal {number}{cause}"


def _unexplained(machines: Sequence[Ended], paths: RunPaths) -> str:
    """No rank has told anything: `accelerate launch` itself failed, or they died before they could."""
    told = next((e for e in machines if e.code > 0), next((e for e in machines if e.code), machines[0]))
    tail = "\n".join(told.agent_output.strip().splitlines()[-5:])
    return f"accelerate launch on {told.host} ended with {told.code}; see {paths.agent_log(told.machine)}\n{tail}"


def _asked(paths: RunPaths) -> str | None:
    """The reason in a STOP file that is left; removed, since the ranks have ended before they could obey it."""
    reason = read_stop(paths.stop_file)
    if reason is not None:
        remove_stop(paths.stop_file)
    return reason


def _complete(
    paths: RunPaths, mine: dict[str, Any], before: dict[str, Any], attempt: str, outcome: Outcome,
    machines: Sequence[Ended],
) -> None:  # fmt: skip
    if outcome.failure is not None and outcome.failure["kind"] == RunLockedError.__name__:
        return  # run.json is of the run that holds the lock
    if not mine and before.get("state") == "finished":
        return  # another start of it failed before it began: it stays finished
    steps = [r["step"] or 0 for ended in machines for r in ended.reports] if mine else []
    steps += [line.get("step", 0) for line in itertools.islice(json_lines.read_backwards(paths.metrics), 1)]
    known = {"host": host(), "job_id": os.environ.get("SLURM_JOB_ID"), "step": 0}
    fields = {"state": outcome.state, "reason": outcome.reason, "exit_code": outcome.exit_code, "attempt": attempt}
    step = max(before.get("step") or 0, *steps, 0)
    error = {"error": outcome.text} if outcome.state == "failed" else {}
    with contextlib.suppress(OSError):  # a full disk, or no output_dir at all
        now = {"step": step, "updated_at": time.time()}
        rewrite_json(paths.run_state, {**known, **before, **fields, **error, **now})


def stopped_early(paths: RunPaths, reason: str) -> Verdict:
    """Completes run.json of a run that was asked to stop before its processes were started."""
    run = files.read_json_or(paths.run_state, {})
    with contextlib.suppress(OSError):
        paths.root.mkdir(parents=True, exist_ok=True)
    outcome = Outcome("interrupted", reason, EXIT_STOPPED)
    _complete(paths, {}, run if isinstance(run, dict) else {}, uuid.uuid4().hex, outcome, [])
    text = "stopped before the start; nothing was running"
    return Verdict(EXIT_STOPPED, text, state=outcome.state, reason=reason)


def give_up(paths: RunPaths, attempt: str, text: str) -> None:
    """Completes run.json from a machine whose first machine has gone; the ranks cannot do it any more."""
    run = files.read_json_or(paths.run_state, {})
    if isinstance(run, dict) and run.get("attempt") == attempt and run.get("state") == "running":
        _complete(paths, run, run, attempt, Outcome("failed", "crash", EXIT_FAILED, text), [])


def newest_checkpoint(paths: RunPaths) -> int | None:
    """The step of the newest one that was committed; None also where the disk does not answer."""
    try:
        return max(paths.own_checkpoints(), default=None)
    except OSError:
        return None


def why_no_restart(outcome: Outcome, earlier: Outcome | None, *, has_new: bool, has_any: bool) -> str | None:
    """Why another start would only do the same again; None where it may help.

    A killed rank and a hang are worth another start. An error is, once, where there is a checkpoint to go on from or
    where the connections failed; the same error before any new checkpoint is not.

    Args:
        outcome: a failure.
        earlier: of the start before this one.
        has_new, has_any: whether this start, or any one, has saved a checkpoint.
    """
    if outcome.is_lost or (outcome.failure is not None and outcome.failure["is_ours"]):
        return ""
    if outcome.reason == "hang" or has_new:
        return None
    if earlier is not None and (mark := _mark(outcome)) is not None and mark == _mark(earlier):
        return "the same again before any new checkpoint"
    report = outcome.failure
    if report is None or has_any or is_connection_loss(report):
        return None
    if report["is_users_code"]:
        return "raised in your own code before any checkpoint: another start would do the same"
    return None if report["training_began"] else "before the first step: another start would do the same"


def _mark(outcome: Outcome) -> tuple[str, str] | None:
    """By which an error is known again; None for a killed rank, which says nothing."""
    if outcome.failure is not None:
        return outcome.failure["kind"], outcome.failure["where"]
    return ("accelerate launch", "") if outcome.text.startswith("accelerate launch") else None
