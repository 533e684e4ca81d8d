"""Where a run goes on: from output_dir, from a folder that is named, or from the Hub."""

from __future__ import annotations

import contextlib

from launcher.base import files
from launcher.base.errors import NoWholeCheckpointError
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.checkpoint import resume
from launcher.checkpoint.resume import ResumePoint
from launcher.config.settings import RunConfig
from launcher.hub import fetch_checkpoint, maybe_fetch_checkpoint
from launcher.saving.interop.importing import import_checkpoint


def find_resume_point(config: RunConfig, paths: RunPaths, processes: Processes) -> tuple[ResumePoint | None, list[str]]:
    """Where to go on; fetches from the Hub first where asked to. Collective."""
    choice = config.checkpoint.resume_from_checkpoint
    uri = choice if choice.startswith("hf://") else None
    if choice == "auto" and config.hub.resume and config.hub.hub_model_id:
        uri = f"hf://{config.hub.hub_model_id}"
    is_optional = choice == "auto"  # with hub.resume: the first start of a run finds nothing there

    def find(choice: str) -> tuple[ResumePoint | None, list[str]]:
        return resume.find(choice, paths, processes, lambda folder: import_checkpoint(folder, config, paths))

    def maybe_fetch() -> bool:
        """Whether there was one."""
        assert uri is not None
        if (maybe_fetch_checkpoint if is_optional else fetch_checkpoint)(uri, paths) is None:
            return False
        with contextlib.suppress(OSError):
            files.make_dirs(paths.hub_dir, within=paths.root, mode=0o700)
            files.write_json(paths.fetched, {"uri": uri}, within=paths.root)
        return True

    def not_asked() -> list[str]:
        """A notice where the run has checkpoints of its own that do not come from there."""
        if is_optional or files.read_json_or(paths.fetched, {}, within=paths.root).get("uri") == uri:
            return []
        return [f"{uri} is not asked, since {paths.root} has checkpoints of its own. To start from it: output_dir=…"]

    if uri is None:
        return find(choice)
    # Once it is in output_dir it is a checkpoint like any other: a restart goes on from the newest one there.
    # What is not ours is ignored, and does not stand for it.
    notices = []
    if not processes.on_main(lambda: bool(resume.own_checkpoints(paths))):
        processes.on_main(maybe_fetch)
    else:
        notices = processes.on_main(not_asked)
    try:
        point, found = find("auto")
    except NoWholeCheckpointError as error:
        if not processes.on_main(maybe_fetch):
            raise
        notices = error.notices
        point, found = find("auto")
    return point, [*notices, *found]
