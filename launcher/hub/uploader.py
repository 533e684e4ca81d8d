"""The uploader process: `python -m launcher.hub.uploader HUB_DIR`. Never imports torch.

It ends with the process that started it: its standard input is closed then, and its parent changes. SIGKILL at any
moment is fine; the next one goes on from the journal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from launcher.base.process import take_cores_back, yield_cores
from launcher.hub.faults import Backoff, Fault, classify, next_commit_delay_s, redact
from launcher.hub.items import Item, UploadSettings
from launcher.hub.layout import DamagedFileError
from launcher.hub.remote import Throttle, connect
from launcher.hub.spool import Spool, reached

IDLE_S = 0.3
MAX_BATCH = 20
HURRIED_BACKOFF_S = 10.0


class Target(Protocol):
    """Where uploads go: a repository or a bucket."""

    card_level: int

    @property
    def name(self) -> str: ...

    def push(self, items: list[Item], save_journal: Callable[[], None]) -> Any: ...

    def maybe_squash(self, now: float, save_journal: Callable[[], None]) -> bool: ...


class Uploader:
    """Empties the spool: one item after the other, each until it is there, as long as it lives."""

    def __init__(self, spool: Spool, settings: UploadSettings) -> None:
        self._spool = spool
        self._settings = settings
        spool.refuse_links()
        self._journal = spool.read_journal()
        if self._journal["target"] != settings.target:  # the user chose another one: what we know is about the old one
            self._journal.update(
                target=settings.target, repo_id=None, card={}, last_squash=None, commits_since_squash=0, pushed={},
                failed={}, tags_due=None, unmarked=[],
            )  # fmt: skip
        self._throttle = Throttle(settings.max_bytes_per_s)
        self._target = build_target(settings, self._journal, self._throttle)
        self._status: dict[str, Any] = {"state": "idle"}
        self._status_lock = threading.Lock()
        self._told: str | None = None
        self._last_error: str | None = None
        """Of what is being tried; it stays in the status while it is tried again."""
        self._was_hurried = False
        self.given_up: list[str] = []
        """What will not be sent because it is damaged or holds links, with the reason."""
        self.hurry = threading.Event()
        """Set to try again at once; stays set: from then on waits are short."""

    def run(self, deadline: float | None = None, *, until_empty: bool = False) -> Fault | None:
        """Uploads until told to stop.

        Args:
            deadline: monotonic time at which to give up; None: never.
            until_empty: return when nothing is left, or when only the user can help.

        Returns: what hinders the uploads, None if nothing does.
        """
        fault: Fault | None = None
        while True:
            items = self._spool.claim()
            if not items:
                self._set_status("idle")
                if until_empty:
                    return None
                time.sleep(IDLE_S)
                continue
            fault = self._upload(items, deadline, is_once=until_empty)
            if fault is not None:
                return fault

    def _upload(self, items: list[Item], deadline: float | None, *, is_once: bool) -> Fault | None:
        """Tries until the items are there or given up. Returns the fault at the deadline, or with `is_once` a
        permanent one."""
        backoff = Backoff(self._settings.backoff_base_s, self._settings.backoff_max_s)
        items = self._wait_for_budget(items)
        while True:
            items = self._without_broken(self._only_newest(items))
            if not items:
                return None
            fault = self._try(items)
            if fault is None:
                return None
            if fault.kind in ("conflict", "card"):
                wait_s = 0.0 if fault.kind == "card" else backoff.next_s() / 4
            elif fault.kind == "permanent":
                if is_once:
                    return fault
                wait_s = self._settings.recheck_s
            else:
                wait_s = backoff.next_s(fault.retry_after_s)
                if self.hurry.is_set() and fault.retry_after_s is None:
                    wait_s = min(wait_s, HURRIED_BACKOFF_S)
            if deadline is not None and time.monotonic() + wait_s > deadline:
                return fault
            self._wait(wait_s, wakes_on_new=fault.kind == "permanent")

    def _try(self, items: list[Item]) -> Fault | None:
        names = ", ".join(item.name for item in items)
        self._throttle.sent_bytes = 0
        tried_at = time.time()
        self._set_status("uploading", item=names, tried_at=tried_at, last_error=self._last_error)
        try:
            started = time.monotonic()
            pushed = self._target.push(items, self._save)
        except DamagedFileError as error:
            self._give_up(next(item for item in items if item.name == error.item), str(error))
            return None  # nothing of this commit is there; the others are tried again without it
        except Exception as error:  # whatever the client raises; the training goes on and so do we
            fault = classify(error, self._target.name)
            self._report(fault, names, tried_at)
            return fault
        self._told = self._last_error = None
        self._done(items, pushed, time.monotonic() - started)
        return None

    def _report(self, fault: Fault, names: str, tried_at: float) -> None:
        """Tells a fault once, not at every try."""
        if fault.kind == "card":
            self._target.card_level += 1
            self._spool.tell(f"Hub: the model card was refused and is sent with less in it: {fault.message}")
            return
        is_permanent = fault.kind == "permanent"
        text = f"{fault.message}. {fault.cure}" if is_permanent else fault.message
        told = f"{fault.kind} {fault.cure}"
        if fault.kind != "conflict" and told != self._told:
            self._told = told
            if is_permanent:
                self._spool.tell(f"Hub: ERROR: {names} cannot be pushed: {text}. The training goes on without.")
            else:
                self._spool.tell(f"Hub: {names} waits, will be tried until it works: {text}")
        self._last_error = text
        # After the message: whoever sees this status finds the reason told.
        self._set_status("blocked" if is_permanent else "waiting", item=names, tried_at=tried_at, last_error=text)

    def _done(self, items: list[Item], pushed: Any, took_s: float) -> None:
        for item in items:
            self._journal["pushed"].pop(item.name, None)
            self._journal["failed"].pop(item.name, None)
            entry = {"step": item.step, "commit": pushed.commit, "bytes": item.total_bytes, "time": time.time()}
            self._journal["pushed"][item.name] = {**entry, "url": pushed.url}
        self._save()
        reached("recorded")
        try:  # while the item is still pending, so that the end of the run waits for it
            self._target.maybe_squash(time.time(), self._save)
        except Exception as error:  # tidying up is not worth a retry; a later push tries again
            self._spool.tell(f"Hub: the history was not squashed: {classify(error, self._target.name).message}")
        self._tell_arrival(items, pushed, took_s)
        self._save()
        for item in items:
            self._spool.discard(item.home)
        reached("removed")

    def _tell_arrival(self, items: list[Item], pushed: Any, took_s: float) -> None:
        names = ", ".join(item.name for item in items)
        size = sum(item.total_bytes for item in items)
        where = f"{self._target.name}@{pushed.commit[:8]}" if pushed.commit else self._target.name
        where = pushed.url or where
        self._spool.tell(f"Hub: {names} is at {where} ({size / 1e6:.1f} MB, {took_s:.0f} s)")
        for notice in self._journal["card"].get("notices", []):
            if notice not in self._journal["told_notices"]:
                self._journal["told_notices"].append(notice)
                self._spool.tell(f"Hub: {notice}")

    def _only_newest(self, items: list[Item]) -> list[Item]:
        """While an upload could not be made, newer ones came: for some strategies it is then pointless."""
        if not self._settings.is_newest_enough:
            return items
        newer = [n.split("-", 1)[1] for n in self._spool.names(self._spool.queue_dir)]
        is_replaced = any(n.startswith("checkpoint-") for n in newer) or (
            self._settings.strategy == "every_save" and bool(newer)
        )
        if not is_replaced or any(item.kind != "checkpoint" for item in items):
            return items
        for item in items:
            if self._spool.discard(item.home):
                self._journal["passed_over"].append(item.name)
        self._save()
        return self._spool.claim()

    def _without_broken(self, items: list[Item]) -> list[Item]:
        """Leaves out items of which a power cut or somebody's hand removed files, or that hold links."""
        whole = []
        for item in items:
            if problem := next(item.problems(), None):
                self._give_up(item, problem)
            else:
                whole.append(item)
        return whole

    def _give_up(self, item: Item, problem: str) -> None:
        self.given_up.append(f"{item.name} is not pushed: {problem}")
        self._journal["failed"][item.name] = problem
        self._save()
        self._spool.tell(f"Hub: ERROR: {self.given_up[-1]}")
        self._spool.discard(item.home)  # last: whoever sees that it is gone finds it told

    def _wait_for_budget(self, items: list[Item]) -> list[Item]:
        """Keeps below the Hub's commits per hour; what is queued meanwhile shares the next commit."""
        times, limit = self._journal["commit_times"], self._settings.commits_per_hour
        delay_s = next_commit_delay_s(times, time.time(), limit)
        if delay_s <= 0:
            return items
        self._set_status("waiting", item=items[0].name, last_error="the Hub takes a limited number of commits an hour")
        end = time.monotonic() + delay_s
        while time.monotonic() < end:
            time.sleep(min(IDLE_S, max(0.0, end - time.monotonic())))
        return self._spool.claim(limit=MAX_BATCH) or items

    def _wait(self, wait_s: float, *, wakes_on_new: bool) -> None:
        """Sleeps; ends early when hurried for the first time, or when something new was queued after a refusal."""
        end = time.monotonic() + wait_s
        before = self._spool.names(self._spool.queue_dir)
        while time.monotonic() < end:
            if self.hurry.is_set() and not self._was_hurried:
                self._was_hurried = True
                return
            if wakes_on_new and self._spool.names(self._spool.queue_dir) != before:
                return
            time.sleep(min(IDLE_S, max(0.0, end - time.monotonic())))

    def _set_status(self, state: str, **details: Any) -> None:
        status = {"state": state, "pid": os.getpid(), **details}
        with self._status_lock:
            if status != self._status:
                self._status = status
                self._spool.write_status(status)

    def report_progress(self) -> None:
        """Adds the bytes of the current upload to the status; called from the watching thread."""
        with self._status_lock:
            if self._status["state"] == "uploading":
                self._spool.write_status({**self._status, "sent_bytes": self._throttle.sent_bytes})

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the Hub is asked again after a restart
            self._spool.write_journal(self._journal)


def build_target(settings: UploadSettings, journal: dict[str, Any], throttle: Throttle) -> Target:
    """The repository, or with `hub.bucket` the bucket."""
    api = connect(settings.timeout_s, throttle)
    if settings.bucket is not None:
        from launcher.hub.bucket import BucketTarget

        target: Target = BucketTarget(api, settings, journal, throttle)
        return target
    from launcher.hub.repo import RepoTarget

    return RepoTarget(api, settings, journal)


def watch(uploader: Uploader, spool: Spool, parent: int) -> None:
    """Runs beside the uploads: ends the process with its parent, and frees the disk of what was given up."""
    while True:
        if os.getppid() != parent:
            os._exit(0)
        with contextlib.suppress(OSError):
            spool.empty_trash()
        uploader.report_progress()
        time.sleep(0.5)


def listen(uploader: Uploader) -> None:
    """Reads the trainer's wishes; the end of the input is the trainer's end."""
    for line in sys.stdin.buffer:
        if line.strip() == b"hurry":  # the training is over: nobody is slowed down any more
            take_cores_back()
            uploader.hurry.set()
    os._exit(0)


def main(argv: list[str]) -> int:
    parent = os.getppid()
    yield_cores()
    spool = Spool(Path(argv[0]))
    settings = spool.read_settings()
    with spool.uploader_lock(wait_s=5.0) as is_mine:
        if not is_mine:
            return 0
        uploader = Uploader(spool, settings)
        threading.Thread(target=listen, args=(uploader,), daemon=True).start()
        threading.Thread(target=watch, args=(uploader, spool, parent), daemon=True).start()
        try:
            uploader.run()
        except Exception:  # the next one goes on; uploader.log keeps why
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
