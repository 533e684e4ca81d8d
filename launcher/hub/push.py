"""`launcher push`: what a folder holds that can be sent, and sending it from this process."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from launcher.base import files, manifest
from launcher.base.errors import DamagedCheckpointError, HubError, UnsafeFileError, UserError
from launcher.base.paths import RunPaths
from launcher.hub.environment import client_environment
from launcher.hub.items import Item, UploadSettings, checkpoint_item, default_repo_name, model_item
from launcher.hub.progress import ProgressLine
from launcher.hub.records import lines_from
from launcher.hub.spool import Spool

MAX_CONFIG_BYTES = 2**22
PATIENCE_S = 600.0
"""How long transient faults are waited out without --follow, in seconds."""


@dataclass(frozen=True)
class Plan:
    """What will be sent. `spool`: the pending uploads of a run; None: `items`, straight from their folders.

    Raises:
        UnsafeFileError: a file is missing, or is a link.
    """

    settings: UploadSettings
    items: tuple[Item, ...]
    spool: Spool | None = None

    def __post_init__(self) -> None:
        _refuse_problems(self.items)


def plan_push(folder: Path, overrides: dict[str, Any]) -> Plan:
    """Decides what `launcher push FOLDER` sends: what is pending in a run, else its model; or this very folder.

    The folder may come from elsewhere: it decides neither where something goes nor that anything outside of it does.

    Args:
        overrides: fields of UploadSettings given on the command line.

    Raises:
        UserError: there is nothing of ours, or nowhere to send it to. UnsafeFileError: it holds links.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Valid: a run, a checkpoint, or an exported model")
    folder = folder.resolve()
    if (folder / manifest.NAME).is_file():
        item = _readable(lambda: checkpoint_item(manifest.read(folder).step, folder), folder)
        return Plan(_settings(folder.parent, overrides, "checkpoint"), (item,))
    spool = Spool(RunPaths(folder).hub_dir)
    spool.refuse_links()
    pending = _pending(spool)
    if pending is not None:
        return Plan(_settings(folder, overrides), tuple(pending), spool)
    item = model_item(folder, None, kind="folder")
    if any(f.path.endswith(".safetensors") for f in item.files):
        return Plan(_settings(folder, overrides, default="every_save"), (item,))
    whole = RunPaths(folder).own_checkpoints()
    if not whole:
        raise UserError(f"{folder} holds no model of ours: no *.safetensors, no checkpoint-N with a manifest")
    step, newest = max(whole.items())
    if newest.is_symlink():
        raise UnsafeFileError(f"{newest} is a link. To send what it leads to: launcher push {newest.resolve()}")
    item = _readable(lambda: checkpoint_item(step, newest), newest)
    return Plan(_settings(folder, overrides, "checkpoint"), (item,))


def _pending(spool: Spool) -> list[Item] | None:
    """What waits to be sent, in its order; None where nothing did. A running uploader may claim or finish an item while
    it is read: it is then looked for again, and left out where it has gone."""
    found = None
    while homes := [d / n for d in (spool.active_dir, spool.queue_dir) for n in spool.names(d)]:
        found = []
        try:
            for home in sorted(homes, key=lambda path: path.name):
                found.append(_readable(partial(spool.read_item, home), home))
            return found
        except UserError:
            if os.path.lexists(home):
                raise
    return found if found is None else []


def _readable(read: Callable[[], Item], place: Path) -> Item:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is no upload of ours: {error}. Remove it, or give another folder") from error


def _refuse_problems(items: Sequence[Item]) -> None:
    """Links and missing files are told before anything is sent: the user is there to mend it."""
    for item in items:
        problem = next(item.problems(), None)
        if problem and (item.home == Path() or item.home.exists()):  # the run's own uploader may be done with it
            cure = f" To send the others, remove {item.home}" if item.home != Path() else ""
            raise UnsafeFileError(f"{item.name} cannot be sent: {problem}.{cure}")


def _settings(
    run_dir: Path, overrides: dict[str, Any], strategy: str | None = None, default: str = "checkpoint"
) -> UploadSettings:
    """From the command line, else from the config.yaml of a run that was made here.

    A config.yaml that says that its run lies elsewhere was moved or received. It then decides nothing: not the
    repository, nor what is deleted there.

    Args:
        strategy: None: what the run's own config says, else `default`. Old checkpoints on the Hub are deleted only
            in the run's own name, not for a folder that was chosen by hand.

    Raises:
        UserError: there is no repository to push to.
    """
    hub, run_name, made_at = _config(RunPaths(run_dir))
    is_own = _is_here(run_dir, made_at)
    named = hub.get("bucket") or hub.get("hub_model_id")
    hub = hub if is_own else {}
    repo_id, bucket = overrides.get("repo_id"), hub.get("bucket")
    if repo_id is None and bucket is None:
        repo_id = hub.get("hub_model_id") or (default_repo_name(run_name) if hub.get("push_to_hub") else None)
    if repo_id is None and bucket is None:
        moved = f" (its config.yaml names {named}, but is of a run in {made_at})" if named and not is_own else ""
        raise UserError(f"there is no repository to push {run_dir} to{moved}: give it one with --repo-id ORG/NAME")
    raw = {
        "run_dir": str(run_dir), "run_name": run_name, "repo_id": repo_id,
        "bucket": None if "repo_id" in overrides else bucket,
        "strategy": strategy or hub.get("hub_strategy") or default,
        "save_total_limit": None if strategy or "repo_id" in overrides else hub.get("save_total_limit"),
        "private": hub.get("hub_private_repo"), "revision": hub.get("hub_revision"),
        "max_bytes_per_s": hub.get("max_bytes_per_s"),
    }  # fmt: skip
    try:
        return UploadSettings.from_dict({**raw, **overrides})
    except ValueError as error:
        raise UserError(f"{run_dir}/config.yaml: hub.{error}") from error


def _is_here(run_dir: Path, made_at: str | None) -> bool:
    """Whether a run's own config.yaml gives it this place; a relative output_dir was relative to some folder above."""
    if not made_at:
        return False
    path = Path(made_at).expanduser()
    if path.is_absolute():
        return path.resolve() == run_dir.resolve()
    parts = Path(os.path.normpath(path)).parts
    return ".." not in parts and run_dir.resolve().parts[-len(parts) :] == parts


def _config(paths: RunPaths) -> tuple[dict[str, Any], str, str | None]:
    """The hub group, run_name and output_dir of a config.yaml; whatever is missing or odd is left out."""
    try:
        config = yaml.safe_load(files.read_bytes(paths.config, MAX_CONFIG_BYTES))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        config = None
    if not isinstance(config, dict):
        config = {}
    hub, name, made_at = (config.get(key) for key in ("hub", "run_name", "output_dir"))
    return (
        hub if isinstance(hub, dict) else {},
        name if isinstance(name, str) else "run",
        made_at if isinstance(made_at, str) else None,
    )


def describe(plan: Plan) -> str:
    """Every file that would be sent, with its bytes, and where to."""
    told = as_data(plan)
    lines = [f"{file['bytes']:>15,}  {file['path']}" for file in told["files"]]
    count, where = len(lines), told["target"]
    lines.append(
        f"{told['bytes']:>15,}  bytes in {count} files, to {where}, with a model card; unchanged ones are not sent"
    )
    return "\n".join(lines)


def as_data(plan: Plan) -> dict[str, Any]:
    """The same for a program."""
    from launcher.hub.layout import wanted_files

    wanted = wanted_files(plan.items, plan.settings.strategy)
    return {
        "target": plan.settings.target,
        "bytes": sum(file.bytes for file in wanted.values()),
        "files": [{"path": path, "bytes": file.bytes} for path, file in sorted(wanted.items())],
    }


def push(plan: Plan, *, follow: bool) -> list[str]:
    """Sends it and waits; transient faults are waited out for ten minutes, with `follow` for as long as it takes.

    Returns: lines for the user.

    Raises:
        HubError: something did not arrive; says the cure.
    """
    if not plan.items:
        return ["sent by the run itself, just now"]
    os.environ.update(client_environment(plan.settings))  # before huggingface_hub is imported
    with nullcontext(plan.spool) if plan.spool is not None else _temporary_spool(plan) as spool:
        with spool.uploader_lock(wait_s=0.5) as is_mine:
            if is_mine:
                return _upload(spool, plan.settings, follow)
        names = ", ".join(item.name for item in plan.items)
        if not follow:
            return [f"{names}: the run itself is sending this now. To watch: --follow"]
        with ProgressLine(spool) as line:
            while spool.pending():
                line.show()
                time.sleep(0.2)
        return [f"{names}: sent by the run itself"]


@contextmanager
def _temporary_spool(plan: Plan) -> Iterator[Spool]:
    with tempfile.TemporaryDirectory(prefix="launcher-push-") as root:
        spool = Spool(Path(root))
        spool.prepare()
        journal = Spool(RunPaths(Path(plan.settings.run_dir)).hub_dir).read_journal()
        if (
            journal["repo_id"] == plan.settings.repo_id is not None
        ):  # what the run knows: its card, its commits of this hour
            spool.write_journal({**journal, "target": plan.settings.target})
        for item in plan.items:
            spool.add_reference(item)
        yield spool


def _upload(spool: Spool, settings: UploadSettings, follow: bool) -> list[str]:
    from launcher.hub.uploader import Uploader

    _, offset = _news(spool, 0)
    uploader = Uploader(spool, settings)
    done = threading.Event()
    watcher = threading.Thread(target=_show, args=(spool, uploader, done), daemon=True)
    watcher.start()
    try:
        fault = uploader.run(None if follow else time.monotonic() + PATIENCE_S, until_empty=True)
    finally:
        done.set()
        watcher.join()
        spool.empty_trash()
    if fault is not None:
        raise HubError(f"not sent: {', '.join(spool.pending())}: {fault.message}. {fault.cure}".strip())
    if uploader.given_up:
        raise DamagedCheckpointError("; ".join(uploader.given_up))
    return _news(spool, offset)[0]


def _show(spool: Spool, uploader: Any, done: threading.Event) -> None:
    with ProgressLine(spool, sys.stderr) as line:
        while not done.wait(0.2):
            uploader.report_progress()
            line.show()


def _news(spool: Spool, offset: int) -> tuple[list[str], int]:
    """What was told since an offset, and the offset after it."""
    found: list[str] = []
    while True:
        texts, after = lines_from(spool.events_path, offset)
        if after == offset:
            return found, offset
        found, offset = [*found, *texts], after
