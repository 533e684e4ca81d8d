"""The trainer's side: fills the spool, keeps an uploader process alive, tells what it does."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from launcher.base import files, manifest
from launcher.base.errors import DamagedCheckpointError, UnsafeFileError
from launcher.base.paths import RunPaths, checkpoint_step
from launcher.config.settings import RunConfig
from launcher.hub.environment import uploader_environment
from launcher.hub.faults import redact
from launcher.hub.items import Item, UploadSettings, checkpoint_item, default_repo_name, model_item
from launcher.hub.progress import ProgressLine
from launcher.hub.records import lines_from
from launcher.hub.spool import Spool

POLL_INTERVAL_S = 0.5
RETRY_INTERVAL_S = 5.0
RESTART_INTERVAL_S = 30.0


def build_settings(config: RunConfig, paths: RunPaths) -> UploadSettings:
    hub = config.hub
    return UploadSettings(
        run_dir=str(paths.root.absolute()),
        strategy=hub.hub_strategy,
        run_name=config.run_name,
        repo_id=hub.hub_model_id or default_repo_name(config.run_name),
        bucket=hub.bucket,
        private=hub.hub_private_repo,
        revision=hub.hub_revision,
        save_total_limit=hub.save_total_limit,
        max_bytes_per_s=hub.max_bytes_per_s,
    )


class SpoolHub:
    """See `launcher.hub.Hub`."""

    def __init__(self, config: RunConfig, paths: RunPaths) -> None:
        self._paths = paths
        self._settings = build_settings(config, paths)
        self._spool = Spool(paths.hub_dir)
        self._max_wait_s = config.hub.max_wait_s
        self._max_spool_bytes = config.hub.max_spool_bytes
        self._uploader = UploaderProcess(self._spool, self._settings)
        self._is_begun = False
        self._told: set[str] = set()
        self._notices: list[str] = []
        self._events_offset = 0
        self._next_poll = 0.0
        self._copies_failed: list[str] = []
        self._refused: dict[int, Path] = {}
        """Step → checkpoint that a full disk kept from being queued."""
        self._next_retry = 0.0

    @property
    def pending_dirs(self) -> tuple[Path, ...]:
        return (self._spool.queue_dir, self._spool.active_dir)  # in this order: uploads move from one to the other

    @property
    def held_names(self) -> Collection[str]:
        return self._spool.copies.names

    def start(self) -> None:
        with self._never_raising("start"):
            self._try_begin()

    def _try_begin(self) -> bool:
        """Takes the spool over, at the first call at which no other process holds it; picks up what was left."""
        if self._is_begun:
            return True
        self._spool.prepare()
        if not self._spool.try_own():
            self._tell_once(f"Hub: another process pushes from {self._spool.root}; this one begins when it has ended")
            return False
        broken = self._spool.clean_up()
        self._spool.write_settings(self._settings)
        self._is_begun = True  # only now: the uploader must not find the settings of an earlier start
        with contextlib.suppress(OSError):
            self._events_offset = self._spool.events_path.stat().st_size
        self._queue_missed()
        pending = self._spool.pending()
        self._notices += [f"Hub: ERROR: {n} is not pushed: {why}" for n, why in broken.items() if n not in pending]
        return True

    def _queue_missed(self) -> None:
        """Queues committed checkpoints that a kill kept from being handed over."""
        if self._settings.strategy == "end":
            return
        journal = self._spool.read_journal()
        is_same = journal["target"] == self._settings.target  # what another repository has is not here
        there = journal["pushed"] if is_same else {}
        pushed = [e["step"] for e in there.values() if e["step"] is not None]
        dropped = self._spool.read_ledger()["dropped"]
        pending = self._spool.pending()
        whole = list(self._paths.own_checkpoints().items())
        if linked := [d for _, d in whole if d.is_symlink()]:
            whole = [(s, d) for s, d in whole if d not in linked]
            self._notices.append(
                f"Hub: {linked[0].name} is a link and is not pushed: what it leads to is not this run's"
            )
        if self._settings.is_newest_enough:
            whole = [(s, d) for s, d in whole[-1:] if s > max(pushed, default=-1)]
        for step, folder in whole:
            if step not in pushed and folder.name not in pending and folder.name not in dropped:
                self._refused[step] = folder
        try:
            self._queue_refused()
        except OSError as error:
            names = ", ".join(self._refused_names)
            self._notices.append(f"Hub: {names} could not be queued: {error}. It is tried again while the run lasts")

    def checkpoint_committed(self, step: int, folder: Path) -> None:
        if self._settings.strategy == "end":
            return
        with self._never_raising(f"queueing checkpoint-{step}", folder):
            if self._is_begun:
                self._queue(step, folder)
            elif not self._try_begin():  # which queues this one too
                return
            self._uploader.ensure_running()

    def _queue(self, step: int, folder: Path) -> None:
        """Behind those that the disk has refused before. Raises: OSError, where it refuses again."""
        is_behind = bool(self._refused)
        self._refused[step] = folder
        self._queue_refused(self._spool.pending() if is_behind else ())

    def _queue_refused(self, pending: Collection[str] = ()) -> None:
        """In their order, as they are sent; the newest alone where that is enough.

        Args:
            pending: names of what is queued: the disk may have refused only what comes behind that.
        """
        self._next_retry = time.monotonic() + RETRY_INTERVAL_S
        while self._refused:
            step = (max if self._settings.is_newest_enough else min)(self._refused)
            folder = self._refused[step]
            try:
                if folder.name not in pending:
                    self._add(checkpoint_item(step, folder))
            except (DamagedCheckpointError, UnsafeFileError, ValueError, FileNotFoundError) as error:
                self._notices.append(f"Hub: ERROR: {folder.name} is not pushed: {error}")
                if not folder.is_dir():
                    self._spool.record(dropped=[folder.name])
            del self._refused[step]
            if self._settings.is_newest_enough and self._refused:
                self._spool.record(passed_over=self._refused_names)
                self._refused.clear()

    def _retry_refused(self) -> None:
        if self._refused:
            with contextlib.suppress(OSError):
                self._queue_refused(self._spool.pending())

    def _add(self, item: Item) -> None:
        home = self._spool.add(item)
        if self._settings.is_newest_enough:
            self._spool.record(passed_over=self._spool.pass_over(home.name))
        self._note_copies()
        dropped = self._spool.drop_beyond(self._spool_limit(item.total_bytes))
        if dropped:
            self._spool.record(dropped=dropped)
            self._notices.append(
                f"Hub: {', '.join(dropped)} will not be uploaded: the spool holds more than hub.max_spool_bytes. "
                f"Raise it, or send a checkpoint by hand: launcher push {self._paths.root}/checkpoint-N"
            )

    def _note_copies(self) -> None:
        """Counts and tells the copies that were not made, where the disk has no hard links."""
        if gave_way := self._spool.copies.take_gave_way():
            if self._settings.is_newest_enough:
                self._spool.record(passed_over=gave_way)
            else:
                self._spool.record(dropped=gave_way)
                self._notices.append(
                    f"Hub: {', '.join(gave_way)} will not be uploaded: {self._spool.root} has no hard links here, and "
                    "saves come faster than they can be copied. A larger checkpoint.save_steps helps, or "
                    f"hub.hub_strategy=checkpoint. By hand, while it is there: launcher push RUN/checkpoint-N"
                )
        for name, error in self._spool.copies.take_failed():
            self._copies_failed.append(name)
            self._notices.append(
                f"Hub: ERROR: {name} could not be copied to be sent: {error}. It is whole; the next start tries again "
                f"if it is still there. To send it by hand: launcher push {self._paths.root}/{name}"
            )

    def _spool_limit(self, checkpoint_bytes: int) -> int:
        """Bytes. By default room for two checkpoints, and for more while half of the disk's free space allows it."""
        if self._max_spool_bytes is not None:
            return self._max_spool_bytes
        free = files.free_bytes(self._spool.root)
        return max(2 * checkpoint_bytes, (free + self._spool.held_bytes()) // 2)

    def poll(self) -> list[str]:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + POLL_INTERVAL_S
            with self._never_raising("poll"):
                self._note_copies()
                if self._try_begin():
                    if now >= self._next_retry:
                        self._retry_refused()
                    if self._spool.pending():
                        self._uploader.ensure_running()
                self._read_events()
        notices, self._notices = self._notices, []
        return notices

    def _read_events(self) -> None:
        texts, self._events_offset = lines_from(self._spool.events_path, self._events_offset)
        self._notices += texts

    def status(self) -> dict[str, Any]:
        with self._never_raising("status"):
            journal, ledger, now = self._spool.read_journal(), self._spool.read_ledger(), self._spool.read_status()
            pending = self._spool.pending()
            return {
                "repo_id": journal["repo_id"] or self._settings.bucket or self._settings.repo_id,
                "pushed": list(journal["pushed"]),
                "pending": pending,
                "failed": [*ledger["dropped"], *journal["failed"], *self._copies_failed, *self._refused_names],
                "passed_over": [*ledger["passed_over"], *journal["passed_over"]],
                "last_error": now["last_error"],
                "command": self._command if pending else None,
            }
        return {}

    @property
    def _refused_names(self) -> list[str]:
        return [folder.name for _, folder in sorted(self._refused.items())]

    @property
    def _command(self) -> str:
        return _push_command(self._paths.root)

    def finish(
        self, model_dir: Path | None, max_wait_s: float | None = None, is_stopping: Callable[[], bool] = lambda: False
    ) -> list[str]:
        wait_s = self._max_wait_s if max_wait_s is None else max_wait_s
        with self._never_raising("finish"):
            if self._try_begin():
                self._retry_refused()
                is_final_due = model_dir is not None and not self._try_add_final(model_dir)
                self._wait(wait_s, is_stopping)
                self._note_copies()
                self._retry_refused()
                if model_dir is not None and is_final_due and self._try_add_final(model_dir):  # there may be room now
                    self._wait(wait_s, is_stopping)
        with self._never_raising("finish"):
            self._uploader.stop()
            self._read_events()
            self._notices += self._left_over()
            self._spool.release()
            self._is_begun = False
        notices, self._notices = self._notices, []
        return notices

    def _try_add_final(self, model_dir: Path) -> bool:
        """False where the disk refused it; the others are sent all the same."""
        try:
            self._add_final(model_dir)
        except (OSError, UnsafeFileError) as error:
            others = ", once the others are sent" if self._spool.pending() else ""
            self._tell_once(f"Hub: the final model could not be queued: {error}. To send it{others}: {self._command}")
            return False
        return True

    def _add_final(self, model_dir: Path) -> None:
        item = model_item(model_dir, None)
        if not item.files:
            self._notices.append(f"Hub: there is no model in {model_dir} to send")
            return
        home = self._spool.add(item)
        self._spool.pass_over(home.name, item.name)  # of an earlier end of this run
        if self._settings.strategy == "every_save":  # both go to the top of the repository
            self._spool.record(passed_over=self._spool.pass_over(home.name))

    def _wait(self, wait_s: float, is_stopping: Callable[[], bool]) -> None:
        """Until everything arrived, only the user can help, the time is over, or somebody asks for a stop."""
        end = time.monotonic() + wait_s
        self._spool.copies.wait(wait_s, is_stopping)
        if wait_s <= 0 or not self._spool.pending() or is_stopping():
            return
        self._uploader.ensure_running()
        asked_at = time.time()
        self._uploader.hurry()
        with ProgressLine(self._spool) as line:
            while self._spool.pending() and time.monotonic() < end and not is_stopping():
                self._uploader.ensure_running()
                status = self._spool.read_status()
                if status["state"] == "blocked" and status["tried_at"] >= asked_at:
                    return
                line.show()
                time.sleep(0.1)

    def _left_over(self) -> list[str]:
        """What did not arrive: it waits, or it was given up and is still there."""
        lines, pending = [], self._spool.pending()
        if pending:
            reason = self._spool.read_status()["last_error"]
            why = f" ({reason})" if reason else ""
            lines.append(f"Hub: not sent yet: {', '.join(pending)}{why}. To send: {self._command}")
        pushed = self._spool.read_journal()["pushed"]
        given_up = [*self._spool.read_ledger()["dropped"], *self._copies_failed, *self._refused_names]
        newest = max((e["step"] for e in pushed.values() if e["step"] is not None), default=-1)
        for name in dict.fromkeys(given_up):
            folder = self._paths.root / name
            is_replaced = self._settings.is_newest_enough and (checkpoint_step(folder) or 0) <= newest
            if name not in (*pending, *pushed) and not is_replaced and (folder / manifest.NAME).is_file():
                lines.append(f"Hub: {name} was not sent. To send it: {_push_command(folder)}")
        return lines

    def _tell_once(self, text: str) -> None:
        """For what a poll finds many times a minute."""
        if text not in self._told:
            self._told.add(text)
            self._notices.append(text)

    @contextlib.contextmanager
    def _never_raising(self, what: str, folder: Path | None = None) -> Any:
        """Whatever goes wrong with the Hub is told, and the training goes on.

        Args:
            folder: what `launcher push` would have to be told; None: the run.
        """
        try:
            yield
        except Exception as error:
            text = (
                f"Hub: {what} failed: {str(error) or repr(error)}. The training goes on. To send later: "
                f"{_push_command(folder or self._paths.root)}"
            )
            self._tell_once(redact(text))


def _push_command(folder: Path) -> str:
    return f"launcher push {shlex.quote(str(folder))}"


class UploaderProcess:
    """The child process `python -m launcher.hub.uploader`, restarted while there is work for it."""

    def __init__(self, spool: Spool, settings: UploadSettings) -> None:
        self._spool = spool
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = -RESTART_INTERVAL_S

    def ensure_running(self) -> None:
        """Starts it if it is not alive; one that dies is started again, but not more often than every 30 s."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started_at < RESTART_INTERVAL_S:
            return
        self.stop()
        self._started_at = time.monotonic()
        with self._open_log() as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher.hub.uploader", str(self._spool.root.absolute())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=uploader_environment(self._settings),
                start_new_session=True,  # a Ctrl-C is for the trainer, which then ends the uploader itself
            )

    def _open_log(self) -> BinaryIO:
        try:
            return files.open_append(self._spool.log_path, mode=0o600)
        except OSError:  # a full disk: what it has to say is in the events, too
            return Path(os.devnull).open("ab")

    def hurry(self) -> None:
        """Ends a wait between two tries."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(b"hurry\n")
                self._process.stdin.flush()

    def stop(self) -> None:
        """Kills it: the journal makes that safe at any moment."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            self._process = None
