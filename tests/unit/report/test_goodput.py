"""Every second of a run is in exactly one part."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.base.timeline import Timeline, note_ended, read_timeline
from launcher.cli.report import goodput as parts
from launcher.cli.report.goodput import Goodput, work_out
from launcher.train.time_spent import TimeSpent


def line(t: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": event, **fields}


def totals(found: Goodput | None) -> dict[str, float]:
    assert found is not None
    for before, after in zip(found.segments, found.segments[1:], strict=False):
        assert before.end == after.start and before.start < before.end and before.kind != after.kind
    spent = {kind: round(found.total_s(kind), 6) for kind in parts.KINDS if found.total_s(kind)}
    assert sum(spent.values()) == pytest.approx(found.wall_s)
    return spent


_FIRST = [
    line(110, "start", began=100, attempt="a"), line(120, "begin", step=0),
    line(121, "progress", step=1), line(130, "progress", step=10, save_s=2), line(135, "evaluation", s=5),
    line(145, "progress", step=20),
]  # fmt: skip


def test_parts_of_a_run_that_nobody_disturbed() -> None:
    lines = [*_FIRST, line(146, "end", state="finished"), line(148, "closed"), line(149, "ended", attempt="a")]
    found = work_out(lines)
    assert totals(found) == {"startup": 20, "productive": 18, "save": 2, "evaluation": 5, "finish": 4}
    assert found is not None and [m.kind for m in found.marks] == ["finish"] and found.num_kills == 0


def test_work_beyond_the_step_gone_on_from_is_lost_when_everything_was_killed() -> None:
    lines = [*_FIRST, line(200, "start", attempt="b"), line(210, "begin", step=15), line(215, "progress", step=20),
             line(216, "end", state="finished"), line(216, "closed")]  # fmt: skip
    found = work_out(lines)
    assert totals(found) == {
        "startup": 30,
        "productive": 18,
        "save": 2,
        "evaluation": 5,
        "lost": 5,
        "down": 55,
        "finish": 1,
    }
    assert found is not None and (found.num_kills, found.num_retrained) == (1, 5)
    assert [m.kind for m in found.marks] == ["kill", "restart", "finish"]


def test_unfinished_step_is_lost_and_no_gap_is_down_when_the_agent_restarts() -> None:
    killed = line(150, "ended", attempt="a", began=100, state="failed", reason="crash", text="rank 1 was killed")
    lines = [*_FIRST, killed, line(152, "start", began=151, attempt="b", is_restart=True), line(160, "begin", step=20),
             line(165, "progress", step=21), line(165, "end", state="finished"), line(165, "closed")]  # fmt: skip
    found = work_out(lines)
    assert totals(found) == {"startup": 30, "productive": 23, "save": 2, "evaluation": 5, "lost": 5}
    assert found is not None and found.num_retrained == 0 and "rank 1 was killed" in found.marks[0].text


def test_steps_are_lost_through_several_attempts_when_none_of_them_saved() -> None:
    lines = []
    for i in range(3):
        lines += [line(100 * i + 100, "start"), line(100 * i + 110, "begin", step=0)]
        lines += [line(100 * i + 120, "progress", step=10)]
    lines += [line(330, "end", state="finished")]
    found = work_out(lines)
    assert totals(found)["lost"] == 20 and totals(found)["productive"] == 10
    assert found is not None and (found.num_kills, found.num_retrained) == (2, 20)


def test_time_switched_off_is_no_loss_when_somebody_stopped_it() -> None:
    stopped = [line(146, "end", state="interrupted", reason="signal"), line(147, "closed")]
    lines = [*_FIRST, *stopped, line(1000, "start"), line(1010, "begin", step=20), line(1020, "progress", step=30)]
    found = work_out(lines, now=1021)
    spent = totals(found)
    assert spent["off"] == 853 and "lost" not in spent and "down" not in spent
    assert found is not None and found.share == pytest.approx(spent["productive"] / (921 - 853))


def test_wait_for_slurm_is_queue_when_submitted_preempted_or_requeued() -> None:
    lines = [line(50, "queued", job_id="7"), line(110, "start", began=100, job_id="7"), line(120, "begin", step=0),
             line(130, "progress", step=10), line(131, "end", state="interrupted", reason="preempted"),
             line(131, "closed"), line(200, "start", job_id="7", requeues="1"), line(210, "begin", step=10),
             line(220, "progress", step=20)]  # fmt: skip
    assert totals(work_out(lines, now=220))["queue"] == 50 + 69
    dead_node = [*_FIRST[:1], *_FIRST[1:], line(200, "start", job_id="7", requeues="1"), line(210, "begin", step=20)]
    dead_node[0] = {**dead_node[0], "job_id": "7"}
    assert totals(work_out(dead_node, now=220))["queue"] == 55


def test_what_a_killed_run_would_train_again_is_lost_when_nobody_has_gone_on_yet() -> None:
    assert totals(work_out(_FIRST, saved_step=10))["lost"] == pytest.approx(10)  # and the evaluation lies before it
    assert "lost" not in totals(work_out(_FIRST, now=146, saved_step=10))  # it lives


def test_first_step_counts_as_start_up_as_far_as_it_was_slower_than_the_others() -> None:
    lines = [line(100, "start"), line(110, "begin", step=0), line(171, "progress", step=1),
             line(172, "progress", step=2), line(173, "progress", step=3)]  # fmt: skip
    assert totals(work_out(lines, now=173)) == {"startup": 70, "productive": 3}


def test_attempt_that_failed_before_it_held_the_folder_is_start_up() -> None:
    lines = [line(105, "ended", attempt="x", began=100, state="failed", reason="crash", text="no torch"), *_FIRST]
    assert totals(work_out(lines, now=145))["startup"] == 20


def test_nothing_in_a_foreign_timeline_breaks_the_sum() -> None:
    source = random.Random(3)
    events = ["start", "begin", "progress", "evaluation", "save", "end", "ended", "closed", "queued", "undone", "x"]
    values = [0, 1, -5, 7.5, 1e300, float("nan"), None, "a", True, [], {}, "12"]
    names = [
        "began",
        "step",
        "s",
        "save_s",
        "evaluation_s",
        "attempt",
        "job_id",
        "requeues",
        "is_restart",
        "state",
        "reason",
    ]
    for _ in range(400):
        lines = [
            line(
                source.uniform(0, 100),
                source.choice(events),
                **{n: source.choice(values) for n in source.sample(names, 5)},
            )
            for _ in range(source.randrange(12))
        ]
        found = work_out(lines, now=source.choice([None, 50.0, 200.0]), saved_step=source.choice([None, 0, 3]))
        assert found is None or totals(found) is not None


# --------------------------------------------------------------------------- writing it


def paths_of(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.logs_dir.mkdir()
    return paths


def test_line_cut_off_by_a_kill_takes_no_other_with_it(tmp_path: Path) -> None:
    paths = paths_of(tmp_path)
    Timeline(paths).append("start")
    with paths.timeline.open("a") as file:
        file.write('{"t": 5, "event": "prog')
    Timeline(paths).append("start", attempt="b")
    Timeline(paths).append("begin", step=3)
    assert [x["event"] for x in read_timeline(paths)] == ["start", "start", "begin"]


def test_timeline_never_fails_and_is_no_longer_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)
    Timeline(paths).append("start")  # no logs/
    note_ended(paths, "a", 1.0, {})
    paths.logs_dir.mkdir()
    (tmp_path / "elsewhere").touch()
    paths.timeline.symlink_to(tmp_path / "elsewhere")
    Timeline(paths).append("start")
    assert (tmp_path / "elsewhere").stat().st_size == 0
    paths.timeline.unlink()
    monkeypatch.setattr("launcher.base.timeline.MAX_BYTES", 4000)
    timeline = Timeline(paths)
    for step in range(200):
        timeline.append("progress", step=step)
    assert 3900 < paths.timeline.stat().st_size <= 4000
    timeline.append("end", state="finished")
    assert list(read_timeline(paths))[-1]["event"] == "end"


def test_progress_is_a_line_per_interval_and_short_stalls_are_summed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    paths = paths_of(tmp_path)
    Timeline(paths).append("start")
    Timeline(paths).append("begin", step=0)
    spent = TimeSpent(Timeline(paths))
    for step in range(1, 101):
        now[0] += 0.08
        spent.advance(step)
        with spent.during("save"):
            now[0] += 0.02
        spent.saved(0.025)  # 5 ms of it in the step after
    with spent.during("evaluation"):
        now[0] += 30
    spent.end("finished", None, 100)
    lines = list(read_timeline(paths))
    assert 15 < len(lines) < 30
    assert sum(x.get("save_s", 0) for x in lines) == pytest.approx(2.5, abs=0.02)
    assert [x["s"] for x in lines if x["event"] == "evaluation"] == [30]
    assert [x["step"] for x in lines if x["event"] == "progress"][-1] == 100
    found = work_out(lines)
    assert found is not None and found.total_s("evaluation") == pytest.approx(30)
    assert found.wall_s == pytest.approx(now[0] - 1000, rel=0.01)


def test_stall_that_goes_on_in_the_next_save_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    paths = paths_of(tmp_path)
    spent = TimeSpent(Timeline(paths))
    spent.advance(1)
    with spent.during("save"):
        now[0] += 0.02
    now[0] += 0.08  # 5 ms of it for the save
    with spent.during("save"):
        now[0] += 0.3  # waits for the first
        spent.saved(0.325)
        now[0] += 0.02
    with spent.during("save"):  # one that is written in the call
        now[0] += 0.4
        spent.saved(0.4)
    spent.end("finished", None, 2)
    assert sum(x.get("save_s", 0) for x in read_timeline(paths)) == pytest.approx(0.02 + 0.005 + 0.32 + 0.4)
