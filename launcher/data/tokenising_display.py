"""What a user sees while rows are tokenised: a bar in a terminal, else a plain line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.data.encoding import BuildReport
    from launcher.data.readers import Meter

_FIRST_LINE_S, _LINE_S = 5.0, 30.0
_BAR_S = 0.2


class TokenisingDisplay:
    """Shown on stderr by one process of a run.

    Args:
        is_shown: the other processes hold a display that shows nothing.
        alive: called all the time; what it raises ends the work.
    """

    def __init__(self, *, is_shown: bool = False, alive: Callable[[], None] = lambda: None) -> None:
        self._is_shown, self._alive = is_shown, alive
        self._bar: Any = None
        self._name, self._started, self._next_line = "", 0.0, 0.0
        self._meter: Meter | None = None
        self._report: BuildReport | None = None

    def alive(self) -> None:
        self._alive()

    def pause(self, seconds: float) -> None:
        self._alive()
        time.sleep(seconds)

    def say(self, text: str) -> None:
        if self._is_shown:
            print(f"launcher: {text}", file=sys.stderr, flush=True)

    def begin(self, name: str, meter: Meter, report: BuildReport) -> Callable[[], None]:
        """The rows of a source are being read; what is returned is to be called all the time."""
        self._name, self._meter, self._report = name, meter, report
        self._started = time.monotonic()
        self._next_line = self._started + (_BAR_S if sys.stderr.isatty() else _FIRST_LINE_S)
        return self._advance

    def end(self, num_tokens: int) -> None:
        """The rows of the source are tokenised."""
        self.close()
        assert self._report is not None
        rows, seconds = self._report.num_read, max(1e-3, time.monotonic() - self._started)
        speed = f"{seconds:.1f} s ({rows / seconds:,.0f} rows/s)"
        self.say(f"tokenised {self._name}: {rows:,} rows, {num_tokens:,} tokens in {speed}")

    def _advance(self) -> None:
        self._alive()
        now = time.monotonic()
        if not self._is_shown or now < self._next_line:
            return
        if sys.stderr.isatty():
            self._next_line = now + _BAR_S
            self._draw()
        else:
            self._next_line = now + _LINE_S
            self.say(f"tokenising {self._name}: {self._figures(now)}")

    def _figures(self, now: float) -> str:
        assert self._report is not None
        rows, seconds, share = self._report.num_read, now - self._started, self._share()
        text = f"{rows:,} rows, {rows / seconds:,.0f} rows/s"
        if share:
            text = f"{share:.0%}, {text}, about {seconds / share - seconds:,.0f} s left"
        return text

    def _share(self) -> float:
        meter = self._meter
        return min(1.0, meter.done / meter.total) if meter is not None and meter.total else 0.0

    def _draw(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("tokenise"), BarColumn(), TextColumn("{task.percentage:.0f} %  {task.fields[text]}"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("tokenise", total=1.0, text="")
            self._bar.start()
        assert self._report is not None
        self._bar.update(self._task, completed=self._share(), text=f"{self._report.num_read:,} rows")

    def close(self) -> None:
        """Takes the bar away, however the work ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
