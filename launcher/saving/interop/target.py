"""What an export reads and where it writes: a whole checkpoint, and a folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.base import files, manifest
from launcher.base.errors import CheckpointWriteError, DamagedCheckpointError, UserError
from launcher.base.files import to_text
from launcher.base.inner_files import inner_file
from launcher.base.paths import CheckpointPaths, RunPaths


@dataclass(frozen=True)
class Exported:
    """A model to export: its folder, the files to copy beside its weights, and whether it has a training state.

    `listed`: see `TensorFiles`.
    """

    folder: Path
    copied: tuple[str, ...]
    is_resumable: bool
    listed: frozenset[str] | None = None

    @property
    def stem(self) -> str:
        """Of its weight files."""
        return "adapter_model" if "adapter_config.json" in self.copied else "model"


def refuse_missing(path: Path) -> None:
    """Raises: UserError, there is no such folder. Needs no torch, unlike what reads it."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder. Give a checkpoint-N folder, or the output_dir of a run")


def choose(path: Path, *, newest: bool) -> Exported:
    """What CHECKPOINT means, every byte of it verified.

    Args:
        path: a checkpoint, or a run: then its best checkpoint if there is one and not `newest`, else its newest. A run
            that saved none is its final model.

    Raises:
        UserError: there is nothing of ours, or a file of the model is a link. DamagedCheckpointError: it is not whole.
    """
    refuse_missing(path)
    folder = path if (path / manifest.NAME).is_file() else _of_run(RunPaths(path), newest=newest)
    if folder is None:
        if (path / "run.json").is_file() and (path / "config.json").is_file():
            listed = frozenset(manifest.model_files(path))
            for name in listed:
                inner_file(path, name)
            model = tuple(sorted(name for name in listed if manifest.role_of(name) == "model"))
            return Exported(path, model, is_resumable=False, listed=listed)
        raise UserError(f"{path} holds no manifest.json and no checkpoint-N folder of ours. Give a checkpoint or a run")
    if problems := manifest.verify(folder):
        raise DamagedCheckpointError(f"{folder} is damaged: " + "; ".join(problems))
    found = manifest.read(folder)
    copied = [entry.path for entry in found.files if entry.role in ("model", "card")]
    state_path = CheckpointPaths(Path()).run_state.as_posix()
    return Exported(folder, tuple(copied), state_path in found.paths, found.paths)


def _of_run(paths: RunPaths, *, newest: bool) -> Path | None:
    ours = paths.own_checkpoints()
    if not ours:
        return None
    last = ours[max(ours)]
    best = files.read_json_or(CheckpointPaths(last).trainer_state, {}, files.MAX_HISTORY_BYTES).get("best_global_step")
    return last if newest else ours.get(best, last)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end, durable; on any error it is removed.

    After a crash only `.tmp-export-*` can remain.

    Raises:
        UserError: the target is in use or its place cannot be written. CheckpointWriteError: no room.
    """
    target = target.expanduser().absolute()
    if files.is_taken(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder. Give another DIR, or remove it first")
    for above in target.resolve().parents:
        if (above / manifest.NAME).is_file():
            raise UserError(f"{target} lies inside of the checkpoint {above}, which stays as it is. Give another DIR")
    temporary = target.with_name(f".tmp-export-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}. Give another DIR") from error
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary, topdown=False):
            files.fsync_dir(Path(folder))
        files.rename(temporary, target)  # an empty folder of that name is replaced
    except OSError as error:
        raise CheckpointWriteError(f"{target} could not be written: {error}") from error
    finally:
        files.remove_tree(temporary)  # after the rename it has its other name


def copy_files(source: Exported, folder: Path, *, dtype: str | None) -> None:
    """Copies config, tokenizer and so on; config.json says the dtype of the weights beside it."""
    for name in source.copied:
        files.make_dirs((folder / name).parent, within=folder)
        if name == "config.json" and dtype is not None:
            config = files.read_json(source.folder / name, within=source.folder)
            config["dtype"] = dtype
            config.pop("torch_dtype", None)  # its name before transformers 5
            files.write_file(folder / name, to_text(config).encode())
        else:
            files.copy_file(source.folder / name, folder / name)
