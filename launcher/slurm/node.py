"""What srun starts on every node: the agent of this machine, the same one that `launcher train` is. No torch.

The first node tells the batch script how the run ended by a word in the file `--verdict`:

    finished, pruned     it has all its steps, or its sweep has enough of it
    interrupted REASON   stopped and saved
    early REASON         asked to stop before anything was running
    unsaved REASON       stopped, and its save failed
    failed CODE          an error of the user's input, or one that a restart does not cure

No word: the machines did not agree, and the script starts all agents again. The exit code is 0 where this node's agent
came to an end of its own: srun ends the others once one did not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from launcher.agent.machine import Verdict
from launcher.agent.outcome import newest_checkpoint
from launcher.agent.supervise import Caller, supervise
from launcher.base import files
from launcher.base.errors import EXIT_FAILED, LauncherError, MachinesError, StoppedEarlyError
from launcher.base.output import survive_closed_output
from launcher.base.paths import RunPaths
from launcher.base.secrets import redacted
from launcher.base.stop_requests import END_TIME
from launcher.config.compose import compose_arguments
from launcher.config.handed_on import hand_on
from launcher.config.settings import RunConfig

_ANSWER_S = 20.0


def main() -> int:
    survive_closed_output()
    given = _parse()
    paths, is_first = RunPaths(given.run_dir), given.node == 0
    arguments = ["--config-file", str(paths.slurm_dir / "config.yaml")]
    caller = Caller(
        lambda: stop_reason(given.job), removes_stop=False, is_heard=is_first,
        num_restarts=_num_restarts(paths, given.start), note_restart=lambda n: _note_restart(paths, given.start, n),
    )  # fmt: skip
    try:
        config = compose_arguments(arguments)
        hand_on(config, arguments)
        verdict = supervise(_of_this_node(config, given), arguments, caller)
    except MachinesError as error:
        return _lost(str(error))
    except StoppedEarlyError:
        word, text = f"early {stop_reason(given.job)}", ""
    except LauncherError as error:
        word, text = f"failed {error.exit_code}", str(error)
    else:
        if verdict.is_lost:
            return _lost(verdict.text)
        word, text = in_a_word(verdict, paths) if is_first else ("", "")
    if is_first:
        if text:
            print(f"launcher: {redacted(text)}", file=sys.stderr, flush=True)
        _write_in_place(given.verdict, word)
    return 0


def _num_restarts(paths: RunPaths, start: str) -> int:
    """Of launch.max_restarts used up inside this start of the job: by the script, or by agents that were lost since."""
    try:
        whose, count = files.read_text(paths.slurm_dir / "restarts", 1000, within=paths.root).split()
        return int(count) if whose == start else 0
    except (OSError, ValueError):
        return 0


def _note_restart(paths: RunPaths, start: str, count: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: this agent itself knows
        files.replace_file(paths.slurm_dir / "restarts", f"{start} {count}\n".encode(), within=paths.root)


def _write_in_place(path: Path, text: str) -> None:
    """The script has made the file and filled it with spaces: a full disk takes what needs no new block.
    Where it is gone, srun has given this agent up, and the script has gone on without its word."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        file.write(text.encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.slurm.node")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--start", default="", help="which start of the job this is")
    parser.add_argument("--verdict", type=Path, required=True)
    parser.add_argument("--main_process_ip", required=True)
    parser.add_argument("--main_process_port", type=int, required=True)
    parser.set_defaults(node=int(os.environ["SLURM_NODEID"]))
    return parser.parse_args()


def _of_this_node(config: RunConfig, given: argparse.Namespace) -> RunConfig:
    launch = dataclasses.replace(
        config.launch, machine_rank=given.node, main_process_ip=given.main_process_ip or None,
        main_process_port=given.main_process_port, env={},  # the script has set it: launch.setup may have changed it
    )  # fmt: skip
    return dataclasses.replace(config, launch=launch)


def _lost(text: str) -> int:
    print(f"launcher: {redacted(text)}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def in_a_word(verdict: Verdict, paths: RunPaths) -> tuple[str, str]:
    """The word for the batch script, and what is to be told beside it."""
    if verdict.state in ("finished", "pruned"):
        return verdict.state, ""
    if verdict.state == "interrupted" and verdict.exit_code == EXIT_FAILED:
        return _unsaved(verdict, paths)
    if verdict.state == "interrupted":
        return f"interrupted {verdict.reason}", ""
    return f"failed {verdict.exit_code}", verdict.text


def _unsaved(verdict: Verdict, paths: RunPaths) -> tuple[str, str]:
    """Of a stop whose save failed: the job may go on from the checkpoint before, but not lose the same steps for ever.

    slurm/unsaved.json holds the newest checkpoint's step. Where it was the same at such a stop before, or where the
    disk does not even take this note, the job ends.
    """
    note, now = paths.slurm_dir / "unsaved.json", {"newest_checkpoint": newest_checkpoint(paths) or 0}
    try:
        if files.read_json_or(note, {}) != now:
            files.write_json(note, now)
            return f"unsaved {verdict.reason}", verdict.text
        why = f"{verdict.text}. It was the same at the stop before, and no checkpoint has come since: not requeued"
    except OSError as error:
        why = f"{verdict.text}. Nothing can be written to {paths.root}: {error}; not requeued"
    run = files.read_json_or(paths.run_state, {})
    with contextlib.suppress(OSError):
        ended = {"state": "failed", "reason": None, "exit_code": EXIT_FAILED, "error": why}
        files.write_json(paths.run_state, {**(run if isinstance(run, dict) else {}), **ended})
    return f"failed {EXIT_FAILED}", why


def stop_reason(job: str) -> str:
    """Why Slurm signals this job. Preempted or at its limit, it is told nothing but the signal."""
    command, text, end = ("scontrol", "-o", "show", "job", job), "", os.environ.get(END_TIME, "")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # in a container there may be no scontrol
        text = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False).stdout
    if re.search(r" PreemptTime=\d", text):
        return "preempted"
    is_over = end.isdecimal() and int(end) <= time.time()  # Slurm may have no time to answer
    return "time_limit" if " Reason=TimeLimit " in text or is_over else "signal"


if __name__ == "__main__":
    sys.exit(main())
