"""Checkpoints to the Hugging Face Hub: a sync that never slows, blocks or ends the training.

The trainer only makes hard links and reads two small files; an uploader process of its own does the rest. Importing
this package imports neither huggingface_hub nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launcher.base.paths import RunPaths

if TYPE_CHECKING:
    from launcher.config.settings import RunConfig
    from launcher.hub.login import LoginState


class Hub(Protocol):
    """What the training loop sees; called on the main process only. No method raises or waits for the network."""

    @property
    def pending_dirs(self) -> tuple[Path, ...]:
        """Folders with uploads that only page cache may hold: to be made durable before their checkpoints go."""

    @property
    def held_names(self) -> Collection[str]:
        """Checkpoints that are being copied where there are no hard links, two at most: they may not go yet."""

    def start(self) -> None:
        """Picks up what an earlier run left. The uploader itself starts at the first poll or save."""

    def checkpoint_committed(self, step: int, folder: Path) -> None:
        """Hands a committed checkpoint over; its folder may be deleted afterwards, unless it is in `held_names`."""

    def poll(self) -> list[str]:
        """Call at every step boundary. Returns lines for the progress display that are new since the last call."""

    def status(self) -> dict[str, Any]:
        """For run.json: pushed, pending, failed, passed_over (names), last_error, command; empty without a Hub."""

    def finish(
        self, model_dir: Path | None, max_wait_s: float | None = None, is_stopping: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Sends the final model, waits at most `max_wait_s` (default hub.max_wait_s) for uploads, ends the uploader.

        Args:
            model_dir: the folder whose top holds the final model; None if the run will be continued.
            is_stopping: asked all the time while it waits; True ends the wait.

        Returns: lines for the user: what did not arrive, why, and the command that sends it.
        """


class NoHub:
    """The null object where nothing is pushed."""

    pending_dirs: tuple[Path, ...] = ()
    held_names: Collection[str] = ()

    def start(self) -> None:
        pass

    def checkpoint_committed(self, step: int, folder: Path) -> None:
        pass

    def poll(self) -> list[str]:
        return []

    def status(self) -> dict[str, Any]:
        return {}

    def finish(
        self, model_dir: Path | None, max_wait_s: float | None = None, is_stopping: Callable[[], bool] = lambda: False
    ) -> list[str]:
        return []


def login_state() -> LoginState:
    """Whether the Hub answers, and as whom. Waits at most a few seconds; never raises."""
    from launcher.hub.login import login_state as ask

    return ask()


def build_hub(config: RunConfig, paths: RunPaths) -> Hub:
    """The run's connection to the Hub; makes no network call and writes nothing yet."""
    if not config.hub.push_to_hub:
        return NoHub()
    from launcher.hub.client import SpoolHub

    return SpoolHub(config, paths)


def fetch_checkpoint(uri: str, paths: RunPaths) -> Path:
    """Downloads `hf://ORG/NAME[@revision]` into `output_dir/checkpoint-N` and verifies every file of it.

    Only the files that the manifest names are fetched, each once and whole: which byte ranges a process needs is
    decided when they are read. No code is run and nothing is unpickled. After a kill the files that are there and
    right are not fetched again.

    Raises:
        ResumeError: there is no checkpoint of ours at that place, or it may not be read.
        DamagedCheckpointError: a file does not match its hash.
    """
    from launcher.hub.fetch import fetch

    return fetch(uri, paths)


def maybe_fetch_checkpoint(uri: str, paths: RunPaths) -> Path | None:
    """As `fetch_checkpoint`, but None where the Hub has no such repository, revision or checkpoint yet.

    Raises:
        ResumeError: it is there and may not be read. HubError: the Hub cannot be reached.
        DamagedCheckpointError: a file does not match its hash.
    """
    from launcher.hub.fetch import NothingThereError, fetch

    try:
        return fetch(uri, paths)
    except NothingThereError:
        return None


def fetch_model(name: str, revision: str | None, *, with_weights: bool = True, with_code: bool = False) -> Path:
    """Downloads a model's config, tokenizer and weights into the client's cache; returns the folder there.

    Only what lies at the top of the repository: no checkpoints, no other formats.

    Args:
        with_weights: False where only the tokenizer is wanted.
        with_code: also the Python files that come with it, for `model.trust_remote_code`.

    Raises:
        ResumeError: it is not there or may not be read. UserError: it has no weights. HubError: the Hub cannot be
            reached.
    """
    from launcher.hub.fetch import download_model

    return download_model(name, revision, with_weights=with_weights, with_code=with_code)


def pushed_checkpoints(paths: RunPaths) -> dict[int, str]:
    """Step → commit of every checkpoint of this run that has reached the Hub."""
    from launcher.hub.records import read_journal

    pushed = read_journal(paths.hub_dir / "journal.json")["pushed"].values()
    return {entry["step"]: entry["commit"] for entry in pushed if entry["step"] is not None}


def as_of_now(told: Any, paths: RunPaths) -> dict[str, Any] | None:
    """What run.json tells of the Hub, with what `launcher push` has sent since the run ended."""
    if not isinstance(told, dict) or not told.get("pending") or not paths.hub_dir.is_dir():
        return told if isinstance(told, dict) else None
    from launcher.hub.records import read_journal

    try:
        pending = pending_uploads(paths)
    except PermissionError:  # a colleague's run, whose uploads are private
        return told
    now = {"pending": pending, "pushed": list(read_journal(paths.hub_dir / "journal.json")["pushed"])}
    return {**told, **now} if pending else {**told, **now, "last_error": None, "command": None}


def send_left_over(config: RunConfig, paths: RunPaths, is_stopping: Callable[[], bool] = lambda: False) -> list[str]:
    """For a run that is finished: sends what is still pending, waiting at most hub.max_wait_s. Never raises.

    Args:
        is_stopping: asked all the time while it waits; True ends the wait.

    Returns: lines for the user; none where nothing was pending, and then nothing is started or written.
    """
    hub = build_hub(config, paths)
    if isinstance(hub, NoHub) or not pending_uploads(paths):
        return []
    hub.start()
    return hub.finish(None, is_stopping=is_stopping)


def pending_uploads(paths: RunPaths) -> list[str]:
    """Names of what still has to be sent; `launcher push RUN` sends it."""
    from launcher.hub.spool import Spool

    return Spool(paths.hub_dir).pending() if paths.hub_dir.is_dir() else []
