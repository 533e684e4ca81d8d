"""The report of a real run that was killed and went on: its time adds up, and it is written at the end by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.base.paths import RunPaths
from launcher.base.timeline import read_timeline
from launcher.cli.report.goodput import DOWN, KINDS, LOST, PRODUCTIVE, work_out
from launcher.cli.report.run_page import read_page
from tests.distributed.runs import Lab, kill, lines, log_text, wait_until

_ROUNDING_S = 0.05
"""Of clock ticks since boot, by which a process knows when it began."""
_SLOW = '[{"kind": "sleep", "seconds": 0.1}]'
_KILLED = '[{"kind": "sleep", "seconds": 0.1}, {"kind": "hang", "step": 28}]'
_MORE = ("train.max_steps=60", "checkpoint.save_steps=10", "eval.eval_strategy=steps", "eval.eval_steps=15")


def test_parts_add_up_to_the_wall_time_and_the_lost_ones_are_named_when_a_run_was_killed(
    lab: Lab, tmp_path: Path
) -> None:
    folder, more = tmp_path / "run", (*_MORE, f"data.eval_files=[{lab._data}]")
    paths, began = RunPaths(folder), [time.time()]  # before and after each start
    pids = lab.start(folder, "zero2", 2, *more, env={"FAULTS": _KILLED})
    began.append(time.time())
    wait_until(lambda: max(lines(paths), default=0) >= 26 and paths.checkpoint_dir(20).is_dir(), "step 26")
    kill(pids)
    killed = time.time()
    assert all(lab.zygote.wait())
    first = list(read_timeline(paths))
    num_lost = max(lines(paths)) - max(step for step, _ in paths.checkpoint_dirs())
    time.sleep(2)
    began.append(time.time())
    lab.start(folder, "zero2", 2, *more, env={"FAULTS": _SLOW, "LAUNCHER_REPORT": "1"})
    began.append(time.time())
    codes = lab.zygote.wait()
    ended = time.time()
    assert codes == [0, 0], log_text(folder)

    page, metrics_read = read_page(folder)
    found = work_out(read_timeline(paths))
    assert found is not None and paths.report.is_file()
    last_line = list(read_timeline(paths))[-1]["t"]
    spent = {kind: found.total_s(kind) for kind in KINDS}
    assert sum(spent.values()) == pytest.approx(found.wall_s, rel=1e-9)
    assert began[0] - _ROUNDING_S < last_line - found.wall_s < began[1] + _ROUNDING_S
    assert ended - last_line < 30  # the report is waited for no longer
    assert first[0]["t"] < first[-1]["t"] <= killed + _ROUNDING_S
    assert began[2] - _ROUNDING_S < first[-1]["t"] + spent[DOWN] < began[3] + _ROUNDING_S
    assert num_lost in (6, 7) and found.num_retrained == num_lost  # steps 21 to 26 or so, 0.1 s each
    assert 0.1 < spent[LOST] < killed - first[0]["t"]
    assert 5.5 < spent[PRODUCTIVE] < 0.9 * found.wall_s
    assert found.num_kills == 1 and [mark.kind for mark in found.marks] == ["kill", "restart", "finish"]
    assert page["retrained"]["compared"] == page["retrained"]["equal"] >= 5  # promise 1, seen in the report
    assert len(metrics_read.series["loss"]) == 60 and min(metrics_read.series["memory_bytes"])[1] > 10**7
    assert json.loads((folder / "run.json").read_text())["about"]["num_rows"] == 37
    assert paths.report.stat().st_size < 500_000
