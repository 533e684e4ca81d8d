"""What the main process shows while it trains: one live panel in a terminal, plain lines in a file or pipe."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from launcher.base import words

_REFRESH_S, _HUB_S = 0.25, 5.0
_SPARKS = "▁▂▃▄▅▆▇█"
_NUM_SPARKS = 32
Status = Callable[[], dict[str, Any]]


class Display(Protocol):
    def advance(self, step: int, hub_status: Status) -> None:
        """A step is done."""

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, of training or evaluation."""

    def saved(self, line: dict[str, Any]) -> None:
        """A committed save."""

    def doing(self, what: str) -> None:
        """What takes the time from here on; empty: steps."""

    def say(self, text: str) -> None:
        """A notice."""

    def close(self) -> None: ...


def build_display(total_steps: int, step: int, best_by: str, *, is_greater_better: bool) -> Display:
    """A panel where stderr is a terminal, else lines."""
    shown = Shown(total_steps, step, best_by, is_greater_better=is_greater_better)
    return Panel(shown) if sys.stderr.isatty() else PlainLines(shown)


class Shown:
    """What is known of the run, in words."""

    def __init__(self, total_steps: int, step: int, best_by: str, *, is_greater_better: bool) -> None:
        self.total_steps, self.step, self._first = total_steps, step, step
        self._best_by, self._sign = best_by, 1 if is_greater_better else -1
        self._started = time.monotonic()
        self._losses: deque[float] = deque(maxlen=_NUM_SPARKS)
        self._best: tuple[float, int] | None = None
        self.line: dict[str, Any] = {}
        self.save: dict[str, Any] = {}
        self.hub: Mapping[str, Any] = {}
        self.doing = "the first step"

    def advance(self, step: int) -> None:
        self.step, self.doing = step, ""

    def log(self, line: dict[str, Any]) -> None:
        if is_number(line.get("loss")):
            self._losses.append(line["loss"])
        if "loss" in line:
            self.line = line
        value: Any = line.get(self._best_by)
        if is_number(value) and (self._best is None or (value - self._best[0]) * self._sign > 0):
            self._best = (float(value), int(line["step"]))

    def left(self) -> str:
        """The time that is left, by the steps of this start."""
        done = self.step - self._first
        if done <= 0 or self.step >= self.total_steps:
            return ""
        return words.duration((time.monotonic() - self._started) / done * (self.total_steps - self.step)) + " left"

    def sparkline(self) -> str:
        """The last losses, low to high."""
        values = [v for v in self._losses if math.isfinite(v)]
        if len(values) < 2:
            return ""
        low, span = min(values), max(values) - min(values)
        return "".join(_SPARKS[round((v - low) / span * (len(_SPARKS) - 1)) if span else 0] for v in values)

    def best(self) -> str:
        if self._best is None:
            return ""
        return f"{self._best_by.removeprefix('eval_')} {words.metric(self._best[0])} at step {self._best[1]:,}"

    def last_save(self) -> str:
        if not self.save:
            return "none yet"
        return f"{self.save['checkpoint']}, stall {words.duration(self.save['save_stall_s'])}"

    def hub_state(self) -> str:
        counts = [
            (len(v), name) for name in ("pushed", "pending", "failed") if isinstance(v := self.hub.get(name), list)
        ]
        return ", ".join(f"{count} {name}" for count, name in counts if count)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def in_words(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the numbers of a line of metrics.jsonl that are worth a look, as people write them."""
    found = []
    for key, value in line.items():
        if not is_number(value):
            continue
        name = key.removeprefix("eval_").replace("_", " ") if key.startswith("eval_") else _NAMES.get(key)
        if name is not None:
            name = f"eval {name}" if key == "eval_loss" else "" if key == "eval_runtime_s" else name
            found.append((name, _FORMATS.get(key, words.metric)(value)))
    return found


_NAMES = {
    "epoch": "epoch", "loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm", "tokens_per_second": "",
    "mfu": "MFU", "memory_bytes": "memory", "router_loss": "router loss", "skipped_steps": "skipped steps",
}  # fmt: skip
_FORMATS: dict[str, Callable[[float], str]] = {
    "epoch": "{:.3g}".format, "learning_rate": "{:.3g}".format, "memory_bytes": words.size, "mfu": words.percent,
    "tokens_per_second": lambda v: f"{words.count(v)} tokens/s", "eval_runtime_s": lambda v: f"in {words.duration(v)}",
    "skipped_steps": "{:.0f}".format,
}  # fmt: skip


class PlainLines:
    """A line per log: for a file, a pipe, a job's output."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def advance(self, step: int, hub_status: Status) -> None:
        self._shown.advance(step)

    def log(self, line: dict[str, Any]) -> None:
        self._shown.log(line)
        parts = [f"{name} {value}".strip() for name, value in in_words(line)]
        left = [self._shown.left()] if "loss" in line and self._shown.left() else []
        self.say("  ".join([f"step {line['step']}/{self._shown.total_steps}", *parts, *left]))

    def saved(self, line: dict[str, Any]) -> None:
        size, stall = words.size(line["bytes"]), words.duration(line["save_stall_s"])
        self.say(f"step {line['step']}: saved {line['checkpoint']}, {size}, stall {stall}")

    def doing(self, what: str) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None: ...


class Panel:
    """A few lines that stay at the bottom of the terminal; notices and evaluations go above them.

    It is drawn by the training thread itself, at most four times a second: no thread of its own beside the ranks'.
    """

    def __init__(self, shown: Shown, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._shown = shown
        self._console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._drawn = self._asked_hub = 0.0
        self._live.start()
        self._draw(is_forced=True)

    def advance(self, step: int, hub_status: Status) -> None:
        self._shown.advance(step)
        now = time.monotonic()
        if now - self._asked_hub >= _HUB_S:
            self._shown.hub, self._asked_hub = hub_status(), now
        self._draw()

    def log(self, line: dict[str, Any]) -> None:
        self._shown.log(line)
        if "loss" not in line:
            parts = "  ".join(f"{name} {value}".strip() for name, value in in_words(line))
            self.say(f"step {line['step']:,}  {parts}")
        self._draw()

    def saved(self, line: dict[str, Any]) -> None:
        self._shown.save = line
        self._draw()

    def doing(self, what: str) -> None:
        self._shown.doing = what
        self._draw(is_forced=bool(what))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _draw(self, *, is_forced: bool = False) -> None:
        now = time.monotonic()
        if is_forced or now - self._drawn >= _REFRESH_S:
            self._drawn = now
            self._live.update(self.render(), refresh=True)

    def render(self) -> Any:
        """The panel as it stands."""
        from rich import box
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown = self._shown
        values = dict(in_words(shown.line))
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1)
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        epoch = f"epoch {values['epoch']}" if "epoch" in values else ""
        doing = shown.doing and f"{shown.doing} …"
        texts = [f"{shown.step:,}/{shown.total_steps:,}", epoch, doing or shown.left()]
        head.add_row(ProgressBar(total=max(1, shown.total_steps), completed=shown.step), "  ".join(filter(None, texts)))
        grid.add_row("steps", head)
        loss = Text().append(values.get("loss", "-"), style="bold").append(f"  {shown.sparkline()}", style="green")
        small = [f"{name} {values[name]}" for name in ("lr", "grad norm") if name in values]
        grid.add_row("loss", loss.append("  " + "  ".join(small)))
        speed = [values.get("", ""), *(f"{name} {values[name]}" for name in ("MFU", "memory") if name in values)]
        grid.add_row("speed", Text("  ".join(filter(None, speed)) or "-"))
        hub = f"  Hub: {shown.hub_state()}" if shown.hub_state() else ""
        grid.add_row("saved", Text(shown.last_save() + hub))
        if shown.best():
            grid.add_row("best", Text(shown.best()))
        return Frame(grid, box=box.ROUNDED, border_style="dim", padding=(0, 1))
