"""`launcher push`: what a folder holds that can be sent, and sending it from this process."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher.base import files, manifest
from launcher.base.errors import HubError, UserError
from launcher.base.paths import RunPaths
from launcher.hub.environment import client_environment
from launcher.hub.progress import ProgressLine
from launcher.hub.spool import Item, Spool, UploadSettings, checkpoint_item, model_item

PATIENCE_S = 600.0
"""How long transient faults are waited out without --follow, in seconds."""


@dataclass(frozen=True)
class Plan:
    """What will be sent. `spool`: the pending uploads of a run; None: `items`, straight from their folders."""

    settings: UploadSettings
    items: tuple[Item, ...]
    spool: Spool | None = None


def plan_push(folder: Path, overrides: dict[str, Any]) -> Plan:
    """Decides what `launcher push FOLDER` sends: what is pending in a run, else its model; or this very folder.

    Args:
        overrides: fields of UploadSettings given on the command line.

    Raises:
        UserError: there is nothing of ours, or nowhere to send it to.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Valid: a run, a checkpoint, or an exported model")
    if (folder / manifest.NAME).is_file():
        item = checkpoint_item(manifest.read(folder).step, folder)
        return Plan(_settings(folder.parent, "checkpoint", overrides), (item,))
    spool = Spool(RunPaths(folder).hub_dir)
    pending = [d / n for d in (spool.active_dir, spool.queue_dir) for n in spool.names(d)]
    if pending:
        settings = replace(spool.read_settings(), **overrides)
        items = [spool.read_item(home) for home in sorted(pending, key=lambda p: p.name)]
        return Plan(settings, tuple(items), spool)
    item = model_item(folder, None, kind="folder")
    if any(f.path.endswith(".safetensors") for f in item.files):
        known = files.read_json_or(spool.settings_path, {})
        return Plan(_settings(folder, known.get("strategy", "every_save"), overrides), (item,))
    whole = [(s, p) for s, p in RunPaths(folder).checkpoint_dirs() if (p / manifest.NAME).is_file()]
    if not whole:
        raise UserError(f"{folder} holds no model of ours: no *.safetensors, no checkpoint-N with a manifest")
    step, newest = whole[-1]
    return Plan(_settings(folder, "checkpoint", overrides), (checkpoint_item(step, newest),))


def _settings(run_dir: Path, strategy: str, overrides: dict[str, Any]) -> UploadSettings:
    """From the run's spool, else its config.yaml, else the command line alone."""
    paths = RunPaths(run_dir)
    known = files.read_json_or(paths.hub_dir / "settings.json", {})
    journal = files.read_json_or(paths.hub_dir / "journal.json", {})
    hub, run_name = _config(paths)
    repo_id = journal.get("repo_id") or known.get("repo_id") or hub.get("hub_model_id")
    settings = UploadSettings(
        run_dir=str(run_dir.absolute()),
        strategy=strategy,
        run_name=run_name,
        repo_id=repo_id,
        bucket=None if "repo_id" in overrides else known.get("bucket") or hub.get("bucket"),
        private=hub.get("hub_private_repo"),
        revision=hub.get("hub_revision"),
        max_bytes_per_s=hub.get("max_bytes_per_s"),
    )
    settings = replace(settings, **overrides)
    if settings.repo_id is None and settings.bucket is None:
        raise UserError("there is no repository to push to: give it one with --repo-id ORG/NAME")
    return settings


def _config(paths: RunPaths) -> tuple[dict[str, Any], str]:
    try:
        config = yaml.safe_load(paths.config.read_text(encoding="utf-8"))
        return dict(config.get("hub") or {}), str(config.get("run_name") or "run")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}, "run"


def describe(plan: Plan) -> str:
    """Every file that would be sent, with its bytes, and where to."""
    from launcher.hub.layout import wanted_files

    wanted = wanted_files(plan.items, plan.settings.strategy)
    lines = [f"{file.bytes:>15,}  {path}" for path, file in sorted(wanted.items())]
    total = sum(file.bytes for file in wanted.values())
    where = plan.settings.bucket or plan.settings.repo_id
    lines.append(
        f"{total:>15,}  bytes in {len(wanted)} files, to {where}, with a model card; unchanged ones are not sent"
    )
    return "\n".join(lines)


def push(plan: Plan, *, follow: bool) -> list[str]:
    """Sends it and waits; transient faults are waited out for ten minutes, with `follow` for as long as it takes.

    Returns: lines for the user.

    Raises:
        HubError: something did not arrive; says the cure.
    """
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
        files.write_json(spool.settings_path, asdict(plan.settings))
        journal = Spool(RunPaths(Path(plan.settings.run_dir)).hub_dir).read_journal()
        if journal["repo_id"] == plan.settings.repo_id:  # what the run knows: its card, its commits of this hour
            spool.write_journal({**journal, "target": plan.settings.bucket or plan.settings.repo_id})
        for item in plan.items:
            spool.add_reference(item)
        yield spool


def _upload(spool: Spool, settings: UploadSettings, follow: bool) -> list[str]:
    from launcher.hub.uploader import Uploader

    offset = spool.events_path.stat().st_size if spool.events_path.exists() else 0
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
    return _news(spool, offset)


def _show(spool: Spool, uploader: Any, done: threading.Event) -> None:
    with ProgressLine(spool, sys.stderr) as line:
        while not done.wait(0.2):
            uploader.report_progress()
            line.show()


def _news(spool: Spool, offset: int) -> list[str]:
    if not spool.events_path.exists():
        return []
    size = spool.events_path.stat().st_size
    lines: Sequence[dict[str, Any]] = list(files.read_json_lines(spool.events_path)) if size > offset else []
    whole = spool.events_path.read_bytes()[:offset].count(b"\n")
    return [str(line["text"]) for line in lines[whole:]]
