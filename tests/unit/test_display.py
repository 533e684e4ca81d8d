"""What a run shows while it trains: a panel in a terminal, lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.config.settings import RunConfig
from launcher.train.about import mfu, summary
from launcher.train.display import Panel, PlainLines, Shown, build_display

_LINE = {"step": 120, "epoch": 0.6432, "loss": 0.41234, "learning_rate": 3.9e-3, "grad_norm": 0.6123,
         "tokens_per_second": 33_221.4, "num_tokens": 10**6, "memory_bytes": 9_123_456_789, "mfu": 0.412}  # fmt: skip
_EVAL = {"step": 120, "epoch": 0.6432, "eval_loss": 0.5, "eval_exact_match": 0.98828, "eval_runtime_s": 3.21}
_SAVE = {"step": 100, "checkpoint": "checkpoint-100", "save_stall_s": 0.0123, "save_write_s": 1.0, "bytes": 5_310_000}


def shown() -> Shown:
    return Shown(700, 0, "eval_exact_match", is_greater_better=True)


def test_line_of_a_pipe_has_numbers_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    display = build_display(700, 0, "eval_exact_match", is_greater_better=True)
    assert isinstance(display, PlainLines)
    display.advance(120, dict)
    display.log(_LINE), display.log(_EVAL), display.saved(_SAVE), display.say("a notice"), display.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "step 120/700  epoch 0.643  loss 0.4123  lr 0.0039  grad norm 0.6123  33.2k tokens/s  memory 9.12 GB  "
        "MFU 41.2 %  "
    )
    assert lines[0].endswith(" left")
    assert lines[1] == "step 120/700  epoch 0.643  eval loss 0.5000  exact match 0.9883  in 3.2 s"
    assert lines[2] == "step 100: saved checkpoint-100, 5.31 MB, stall 0.012 s" and lines[3] == "a notice"


def panel(width: int = 100) -> tuple[Panel, io.StringIO]:
    out = io.StringIO()
    return Panel(shown(), Console(file=out, force_terminal=True, width=width, highlight=False)), out


def text_of(found: Panel, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(found.render())
    return console.export_text()


def test_panel_shows_everything_that_one_looks_for() -> None:
    found, out = panel()
    assert "the first step" in text_of(found)
    for step in range(1, 41):
        found.advance(step, lambda: {"pushed": ["checkpoint-1", "checkpoint-2"], "pending": ["x"], "failed": []})
        found.log({**_LINE, "step": step, "loss": 1 / step})
    found.log(_EVAL), found.saved(_SAVE)
    text = text_of(found)
    for part in (
        "40/700", "epoch 0.643", "left", "█", "lr 0.0039", "33.2k tokens/s", "MFU 41.2 %", "memory 9.12 GB",
        "checkpoint-100, stall 0.012 s", "Hub: 2 pushed, 1 pending", "exact_match 0.9883 at step 120",
    ):  # fmt: skip
        assert part in text, (part, text)
    found.doing("evaluating")
    assert "evaluating …" in text_of(found)
    assert "step 120  epoch 0.643  eval loss 0.5000" in out.getvalue()  # above the panel
    assert all(len(line) <= 50 for line in text_of(found, 50).splitlines())


def test_nothing_of_the_panel_stays_when_it_is_closed() -> None:
    found, out = panel()
    found.advance(1, dict)
    found.say("[bold]stopped[/] \x07")
    found.close()
    end = out.getvalue()[out.getvalue().rindex("stopped") :]
    assert "\x1b[?25h" in end and "\x1b[2K" in end  # the cursor is shown, the lines are erased
    assert "[bold]stopped[/]" in out.getvalue()


@pytest.mark.parametrize(
    "line", [{"step": 1, "loss": None}, {"step": 1, "loss": float("nan")}, {"step": 1, "eval_x": True}]
)
def test_odd_line_is_shown(line: dict[str, Any]) -> None:
    found, _ = panel()
    found.advance(1, dict)
    found.log(line), found.log(line)
    assert text_of(found)


def test_mfu_is_of_the_devices_peak_and_absent_where_that_is_not_known() -> None:
    about = {"device": "NVIDIA H100 80GB HBM3", "num_parameters": 7 * 10**9, "num_trainable_parameters": 7 * 10**9,
             "num_processes": 8}  # fmt: skip
    line = {"step": 1, "tokens_per_second": 80_000.0}
    assert mfu(line, about) == pytest.approx(80_000 * 6 * 7e9 / (8 * 989e12), abs=1e-4)
    assert mfu(line, {**about, "num_trainable_parameters": 10**6}) == pytest.approx(0.2831, abs=1e-4)  # LoRA
    assert mfu(line, {**about, "device": "CPU"}) is None and mfu({"step": 1}, about) is None


def test_summary_says_how_a_step_is_split() -> None:
    config = RunConfig()
    config.model.model_name_or_path, config.train.train_batch_size = "org/model", 64
    about = {"device": "CPU", "num_parameters": 437_000, "num_trainable_parameters": 43_700, "num_processes": 2,
             "num_rows": 11_899, "num_eval_rows": None}  # fmt: skip
    lines = summary(config, about, epochs=2.25, total_steps=420)
    assert lines[0] == "model    org/model, 437k parameters (43.7k trained, 10.0 %), float32"
    assert lines[1:3] == [
        "data     11,899 rows",
        "steps    420 (2.25 epochs), 64 samples each: 2 processes x 8 x 4 micro-steps",
    ]
