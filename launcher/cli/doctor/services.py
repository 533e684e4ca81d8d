"""Folders and services that a run uses: output_dir, disks, the Hub, a tracker, Slurm."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from launcher import hub as hub_room
from launcher.base import files, lock_file
from launcher.base.paths import RunPaths, default_cache_dir
from launcher.base.words import size
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.config.settings import RunConfig
from launcher.config.trackers import tracker_problems

_FEW_BYTES = 10**9
_SLURM_TIMEOUT_S = 20.0


def output_folder(config: RunConfig) -> Iterator[Finding]:
    """What the file system of output_dir can do: writes, fsync, rename, hard links, kernel locks."""
    target = Path(config.output_dir).expanduser().absolute()
    folder = _existing(target)
    probe = folder / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        started = time.perf_counter()
        files.write_file(probe, b"x" * 2**20)
        files.fsync_dir(folder)
        took_s = time.perf_counter() - started
    except OSError as error:
        what = f"{folder} cannot be written ({error.strerror})"
        yield Finding("output_dir", ERROR, what, "output_dir=/ANOTHER/FOLDER")
        return
    try:
        lacking = _abilities(probe)
    finally:
        for path in (probe, probe.with_suffix(".link"), probe.with_suffix(".renamed")):
            path.unlink(missing_ok=True)
    text = f"{target}: writable, a durable write of 1 MiB takes {1000 * took_s:.0f} ms"
    yield Finding("output_dir", WARNING if took_s > 1.0 else OK, text)
    for what in lacking:
        yield Finding("output_dir", WARNING, what)
    holder = lock_file.read(RunPaths(target).lock) if target.is_dir() else None
    if holder is not None:
        yield Finding("output_dir", WARNING, f"{target} is locked by {holder}: a second start waits or is refused",
                      f"launcher status {target}")  # fmt: skip


def _existing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _abilities(probe: Path) -> list[str]:
    """What the file system cannot do, and what follows."""
    lacking = []
    try:
        os.link(probe, probe.with_suffix(".link"))
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        lacking.append("no hard links: what is published and uploaded is copied, and needs its space twice")
    with probe.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lacking.append("no kernel locks (flock): the run's lock relies on its heartbeat alone")
    with contextlib.suppress(OSError):
        probe.rename(probe.with_suffix(".renamed"))
    return lacking


def disks(config: RunConfig) -> Iterator[Finding]:
    cache_dir = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else default_cache_dir()
    wanted = {
        "output_dir": _existing(Path(config.output_dir).expanduser().absolute()),
        "data.cache_dir": _existing(cache_dir.absolute()),
        "temporary files": Path(tempfile.gettempdir()),
    }
    told: dict[int, list[str]] = {}
    for what, folder in wanted.items():
        told.setdefault(folder.stat().st_dev, []).append(what)
    for folder in wanted.values():
        names = told.pop(folder.stat().st_dev, None)
        if names is None:
            continue
        usage = shutil.disk_usage(folder)
        is_short = usage.free < _FEW_BYTES
        yield Finding("disk", WARNING if is_short else OK,
                      f"{size(usage.free)} free of {size(usage.total)} for {', '.join(names)} ({folder})",
                      "launcher plan says what a run needs" if is_short else None)  # fmt: skip
        inodes = os.statvfs(folder)
        if inodes.f_files and inodes.f_favail < 10_000:
            yield Finding("disk", WARNING, f"{inodes.f_favail} more files fit into {folder}", f"df -i {folder}")


def hub(config: RunConfig) -> Iterator[Finding]:
    state = hub_room.login_state()
    if state.is_offline:
        yield Finding("hub", ERROR if config.hub.push_to_hub else OK, "HF_HUB_OFFLINE is set: nothing is sent",
                      "unset HF_HUB_OFFLINE" if config.hub.push_to_hub else None)  # fmt: skip
    elif state.problem:
        status = ERROR if config.hub.push_to_hub else WARNING
        yield Finding("hub", status, f"{state.endpoint}: {state.problem}", state.fix)
    else:
        yield Finding("hub", OK, f"{state.endpoint}: logged in as {state.user}")


def tracker(config: RunConfig) -> Iterator[Finding]:
    problems = list(tracker_problems(config))
    for problem in problems:
        yield Finding("tracker", ERROR, problem)
    if not problems and config.tracker.name:
        yield Finding("tracker", OK, config.tracker.name)


def slurm(config: RunConfig) -> Iterator[Finding]:
    is_wanted = config.launch.name == "slurm"
    if shutil.which("sbatch") is None:
        yield Finding("slurm", ERROR if is_wanted else OK, "sbatch is not here: no Slurm on this machine",
                      "run it on a login node of the cluster" if is_wanted else None)  # fmt: skip
        return
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%P %a %D %t"], capture_output=True, text=True,
                              timeout=_SLURM_TIMEOUT_S, check=False)  # fmt: skip
        problem = done.stderr.strip().partition("\n")[0] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        done, problem = None, str(error)
    if problem or done is None:
        yield Finding("slurm", ERROR if is_wanted else WARNING, f"it does not answer: {problem}", "scontrol ping")
        return
    partitions = sorted({line.split()[0] for line in done.stdout.splitlines() if line.split()})
    yield Finding("slurm", OK, f"answers; partitions: {', '.join(partitions) or 'none'}")
