"""Where to go on: the newest whole checkpoint, damaged ones moved aside, settings compared."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from launcher.base import files, manifest
from launcher.base.errors import DamagedCheckpointError, NoWholeCheckpointError, ResumeError, ResumeMismatchError
from launcher.base.paths import CheckpointPaths, RunPaths, checkpoint_step, is_own_checkpoint
from launcher.base.process import RESTARTED

if TYPE_CHECKING:
    from launcher.base.processes import Processes

_STATE_PATH = CheckpointPaths(Path()).run_state.as_posix()
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,), "total_steps": (int,), "samples_seen": (int,), "world_size": (int,), "progress": (dict,),
    "scheduler": (dict,), "scaler": (dict, NoneType), "optimizer": (dict,), "settings": (dict,),
    "origin": (str, NoneType), "imported": (dict, NoneType),
}  # fmt: skip
_NOT_NOW = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
)  # fmt: skip
"""Why a file cannot be opened, whatever it holds."""
ROUNDING_KEYS = (
    "strategy", "strategy.deepspeed.zero_optimization", "num_processes", "per_device_train_batch_size",
    "train.fused_loss", "train.torch_compile", "attention", "num_threads",
)  # fmt: skip


@dataclass
class ResumePoint:
    """A verified checkpoint and its state.json; `notices` are for the user."""

    folder: Path
    step: int
    state: dict[str, Any]
    notices: list[str] = field(default_factory=list)


def find(
    choice: str, paths: RunPaths, processes: Processes, importer: Callable[[Path], Path]
) -> tuple[ResumePoint | None, list[str]]:
    """The checkpoint that `checkpoint.resume_from_checkpoint` (auto, never or a folder) means, every byte verified.

    Collective: the processes share the reading. Damaged checkpoints found on the way are renamed to
    `checkpoint-N.damaged`. `never` and a path are obeyed once: a run that was restarted (RESTARTED in the environment)
    after `never`, or whose own checkpoints already descend from that path, goes on from its newest one. Checkpoints of
    ours that the new start would contradict are renamed to `checkpoint-N.superseded`.

    Args:
        importer: makes a checkpoint of ours from a folder of another tool that is named explicitly; main process.

    Returns:
        The point (None: start at step 0) and notices.

    Raises:
        ResumeError, DamagedCheckpointError: an explicit path cannot be used, one cannot be read now, or only damaged
            ones are left.
    """
    has_ours = processes.on_main(lambda: bool(own_checkpoints(paths)))
    if choice == "auto" or (choice == "never" and os.environ.get(RESTARTED) and has_ours):
        return _newest(paths, processes)
    if choice == "never":
        return None, processes.on_main(lambda: supersede(paths, above_step=-1))
    folder = Path(choice).expanduser().resolve()
    # The first version wrote the path itself.
    if processes.on_main(lambda: origin_of_newest(paths) in (origin_id(folder), str(folder))):
        return _newest(paths, processes)
    point = _explicit(folder, processes, importer)
    point.state["origin"] = origin_id(folder)
    keep = point.step if point.folder.parent == paths.root else -1
    point.notices += processes.on_main(lambda: supersede(paths, above_step=keep))
    return point, point.notices


def origin_id(folder: Path) -> str:
    """What a checkpoint remembers of the explicit path that its run started from: enough to know it again.

    Not the path itself, because checkpoints go to the Hub and a path names a machine's users and projects.
    """
    return hashlib.sha256(str(folder).encode()).hexdigest()


def origin_of_newest(paths: RunPaths) -> str | None:
    """`origin_id` of the explicit path from which this run's newest checkpoint descends.

    One whose state is damaged says nothing: the run would begin at that path again, and lose all whole ones.
    """
    for _, folder in reversed(list(paths.checkpoint_dirs())):
        if (state := _state_as_listed(folder)) is not None:
            origin = state.get("origin")
            return str(origin) if origin else None
    return None


def _state_as_listed(folder: Path) -> dict[str, Any] | None:
    """state.json of a checkpoint of ours, where its bytes are those of the manifest."""
    try:
        listed = {entry.path: entry.sha256 for entry in manifest.read(folder).files}
        data = files.read_bytes(CheckpointPaths(folder).run_state, files.MAX_JSON_BYTES, within=folder)
        is_whole = hashlib.sha256(data).hexdigest() == listed.get(_STATE_PATH)
        state = files.parse_json(data) if is_whole else None
    except (OSError, ValueError, DamagedCheckpointError):
        return None
    return state if isinstance(state, dict) else None


def supersede(paths: RunPaths, above_step: int) -> list[str]:
    """Renames our checkpoints beyond a step: kept, but no longer taken for this run's."""
    moved = [_move_aside(f, "superseded").name for s, f in own_checkpoints(paths).items() if s > above_step]
    return [f"kept under another name, since the run starts before them: {', '.join(moved)}"] if moved else []


def newest_before(step: int, paths: RunPaths, processes: Processes) -> tuple[ResumePoint | None, list[str]]:
    """The newest whole checkpoint of ours that is older than `step`, as `find` verifies them; damaged ones on the way
    are renamed. Collective.

    Returns:
        The point, or None, and notices.
    """
    found = processes.on_main(lambda: [str(f) for s, f in own_checkpoints(paths).items() if s < step])
    point, _, notices = _first_whole(found[::-1], processes, leave_out_newer=True)
    return point, notices


def own_checkpoints(paths: RunPaths) -> dict[int, Path]:
    """`RunPaths.own_checkpoints`. Raises: ResumeError: one may not be entered."""
    return {step: folder for step, folder in paths.checkpoint_dirs() if _is_ours(folder)}


def _is_ours(folder: Path) -> bool:
    try:
        return is_own_checkpoint(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _refuse_unreadable(folder: Path) -> None:
    """Before a checkpoint is called damaged and renamed: it would stay behind when it can be read again.

    Raises:
        ResumeError: one of its files cannot be opened for a reason that says nothing of what is in it.
    """
    names = [manifest.NAME]
    with contextlib.suppress(OSError, DamagedCheckpointError):
        names += [entry.path for entry in manifest.read(folder).files]
    for name in names:
        try:
            files.open_read(folder / name, within=folder).close()
        except OSError as error:
            if error.errno in _NOT_NOW:
                raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> ResumeError:
    return ResumeError(
        f"{folder} cannot be read now: {error.strerror} for user {os.getuid()}. It stays as it is: mend that and run "
        "the same command again, or go on from another one: checkpoint.resume_from_checkpoint=FOLDER"
    )


def _newest(paths: RunPaths, processes: Processes) -> tuple[ResumePoint | None, list[str]]:
    notices: list[str] = []
    found, notices = processes.on_main(lambda: (_candidates(paths, notices), notices))
    point, damaged, more = _first_whole(found, processes)
    notices += more
    if point is not None:
        point.notices = notices + point.notices
        return point, point.notices
    left_over = processes.broadcast(sorted(p.name for p in paths.root.glob("checkpoint-*.damaged*")))
    if damaged or left_over:
        raise NoWholeCheckpointError(
            f"no whole checkpoint is left in {paths.root}, only damaged ones "
            f"({', '.join(sorted({*damaged, *left_over}))}). "
            + " ".join(notices)
            + " To start again from step 0: checkpoint.resume_from_checkpoint=never",
            notices,
        )
    return None, notices


def _first_whole(
    found: Sequence[str], processes: Processes, *, leave_out_newer: bool = False
) -> tuple[ResumePoint | None, list[str], list[str]]:
    """The first whole one of these folders, the names of damaged ones before it, which are renamed, and notices.

    Nothing is read of the folders after it: there may be thousands.

    Raises:
        DamagedCheckpointError: a later version wrote one before it, and `leave_out_newer` is not set.
    """
    damaged: list[str] = []
    notices: list[str] = []
    for folder in map(Path, found):
        if processes.on_main(partial(_is_of_later_version, folder, is_refused=not leave_out_newer)):
            continue
        # Read a second time before it is called damaged: a disk or a network file system may fail once.
        problems = _problems(folder, processes) and _problems(folder, processes)
        if not problems:
            return _open(folder, processes), damaged, notices
        aside, notice = _put_aside(folder, problems, processes)
        damaged.append(aside)
        notices.append(notice)
    return None, damaged, notices


def put_aside_if_damaged(folder: Path, processes: Processes) -> str | None:
    """Renames a checkpoint of ours whose model is damaged; what was done, or None where it is whole. Collective."""

    def problems() -> list[str]:
        try:
            mine = manifest.verify(folder, processes.rank, processes.world_size, without_state=True)
        except OSError as error:
            mine = [str(error)]
        return [p for share in processes.gather(mine) for p in share]

    found = problems() and problems()
    return _put_aside(folder, found, processes)[1] if found else None


def _put_aside(folder: Path, problems: list[str], processes: Processes) -> tuple[str, str]:
    """Its new name, and a notice. Collective."""
    processes.on_main(partial(_refuse_unreadable, folder))
    aside = processes.on_main(partial(_move_aside, folder, "damaged"))
    return aside.name, f"{folder.name} is damaged ({problems[0]}); moved to {aside.name}"


def _candidates(paths: RunPaths, notices: list[str]) -> list[str]:
    found = []
    for _, folder in paths.checkpoint_dirs():
        if not _is_ours(folder):
            mend = f"; to use it: checkpoint.resume_from_checkpoint={folder}" if _is_importable(folder) else ""
            notices.append(f"{folder.name} has no manifest.json of ours and is ignored{mend}")
        else:
            found.append(str(folder))
            if folder.is_symlink():
                notices.append(
                    f"{folder.name} is a link to {folder.readlink()}: it is read, but never deleted, and "
                    "checkpoint.save_total_limit does not count it"
                )
    return found[::-1]


def _is_importable(folder: Path) -> bool:
    """Whether the Trainer left a training state there, alone, under DDP or under DeepSpeed."""
    return (folder / "optimizer.pt").is_file() or any(folder.glob("global_step*/"))


def from_weights(folder: Path) -> str:
    """The overrides by which a new run starts from the weights of a checkpoint, whatever the old one started from."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return (
        f"model.adapter_name_or_path={folder}" if is_adapter else f"model.model_name_or_path={folder} model.config=null"
    )


def _is_of_later_version(folder: Path, *, is_refused: bool) -> bool:
    is_newer = manifest.is_newer_format(folder)
    if is_newer and is_refused:
        manifest.read(folder)  # raises with the line that mends it
    return is_newer


def _problems(folder: Path, processes: Processes) -> list[str]:
    """Each process re-reads its share of the chunks; all get all problems. Collective."""
    try:
        mine = manifest.verify(folder, processes.rank, processes.world_size)
        found = manifest.read(folder)
        if not mine and found.step != checkpoint_step(folder):
            mine = [f"manifest.json is of step {found.step}"]
        if not mine and any(entry.path == _STATE_PATH for entry in found.files):
            read_state(folder)
    except (OSError, ValueError, DamagedCheckpointError) as error:
        mine = [str(error)]
    return [p for share in processes.gather(mine) for p in share]


def _move_aside(folder: Path, why: str) -> Path:
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while files.is_taken(target):
        count += 1
        target = folder.with_name(f"{folder.name}.{why}-{count}")
    try:
        files.rename(folder, target)
    except OSError as error:
        raise DamagedCheckpointError(
            f"{folder} is {why} and cannot be renamed to {target.name}: {error}. Rename or remove it yourself"
        ) from error
    return target


def _explicit(folder: Path, processes: Processes, importer: Callable[[Path], Path]) -> ResumePoint:
    if not _is_ours(folder):
        foreign = folder
        folder = processes.on_main(lambda: importer(foreign))
    mine = manifest.verify(folder, processes.rank, processes.world_size)
    problems = [p for share in processes.gather(mine) for p in share]
    if problems:
        processes.on_main(partial(_refuse_unreadable, folder))
        raise DamagedCheckpointError(f"{folder} is damaged: " + "; ".join(problems))
    return _open(folder, processes)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, whose bytes are those of its manifest; its values have the types that they should.

    Raises:
        DamagedCheckpointError: it is not one that this tool wrote.
    """
    path = CheckpointPaths(folder).run_state
    try:
        state = files.read_json(path, within=folder)
        if not isinstance(state, dict):
            raise ValueError(f"it holds {state!r:.100}")
        wrong = [k for k, types in _STATE_TYPES.items() if k in state and type(state[k]) not in types]
        if wrong or state.get("step") != manifest.read(folder).step:
            key = [*wrong, "step"][0]
            raise ValueError(f"{key} is {state.get(key)!r:.100}")
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} is not the state of this checkpoint: {error}") from error
    return state


def _open(folder: Path, processes: Processes) -> ResumePoint:
    found = manifest.read(folder)
    if all(entry.path != _STATE_PATH for entry in found.files):
        raise ResumeError(
            f"{folder} holds only the model (it was saved with checkpoint.save_only_model=true) and cannot be resumed. "
            f"To train on from its weights: {from_weights(folder)} in another output_dir, or start again with "
            "checkpoint.resume_from_checkpoint=never"
        )
    state = read_state(folder)
    point = ResumePoint(folder, found.step, state)
    if processes.is_main:
        unknown = manifest.unknown_files(folder, found)
        point.notices += (
            [f"{folder.name}: ignored, not part of the checkpoint: {', '.join(unknown)}"] if unknown else []
        )
    return point


def compare_settings(saved: dict[str, Any], now: dict[str, Any], *, accept: bool) -> list[str]:
    """Compares the settings that decide the result.

    Returns:
        Notices: what is equal up to rounding only, or was accepted.

    Raises:
        ResumeMismatchError: others differ and `checkpoint.accept_changes` is not set.
    """
    changed = [k for k in sorted({*saved, *now}) if saved.get(k) != now.get(k)]
    hard = [k for k in changed if k not in ROUNDING_KEYS]
    lines = [f"{k}: {saved.get(k)!r} in the checkpoint, {now.get(k)!r} now" for k in changed]
    if hard and not accept:
        shown = "\n".join(f"  {k}: {saved.get(k)!r} in the checkpoint, {now.get(k)!r} now" for k in hard)
        raise ResumeMismatchError(
            f"these settings differ from the checkpoint's and would change the result:\n{shown}\n"
            "To continue with the new ones: checkpoint.accept_changes=true. To start again: "
            "checkpoint.resume_from_checkpoint=never"
        )
    soft = [line for k, line in zip(changed, lines, strict=True) if k in ROUNDING_KEYS]
    notices = [f"equal up to rounding from here ({'; '.join(soft)})"] if soft else []
    return notices + [f"accepted: {line}" for k, line in zip(changed, lines, strict=True) if k in hard]
