"""`launcher report`: what the page holds, and that nothing of a run's folder becomes more than text in it."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.base import words
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths
from launcher.cli import report
from launcher.cli.report.curves import read_metrics, thinned
from launcher.cli.report.page import MAX_BYTES
from tests.unit.report.folders import HOSTILE, make_run, make_sweep


class _Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page_of(root: Path) -> str:
    assert report.main([str(root), "-q"]) == 0
    return (root / "report.html").read_text()


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_page_of_a_run_shows_what_its_folder_says(tmp_path: Path) -> None:
    html = page_of(make_run(tmp_path / "run").root)
    texts = _Elements(html).texts
    for shown in (
        "a run", "finished (x)", "1.23M parameters", "best exact match", "33.2k", "trained again", "org/model",
        "1 logged step trained twice: every loss equal to the last bit", "checkpoint-200", "1 GB",
    ):  # fmt: skip
        assert shown in texts, shown
    data = data_of(html)
    assert [c["key"] for c in data["charts"]][:3] == ["loss", "eval_exact_match", "learning_rate"]
    assert data["charts"][0]["labels"] == ["training", "evaluation"] and data["bands"] == [[50, 70]]
    assert data["goodput"]["wall_s"] == 251


@pytest.mark.parametrize("make", [make_run, make_sweep])
def test_nothing_of_the_folder_becomes_an_element(make: Any, tmp_path: Path) -> None:
    plain, hostile = tmp_path / "plain", tmp_path / "hostile"
    make(plain), make(hostile, hostile=HOSTILE)
    expected, found = (_Elements(page_of(root)).found for root in (plain, hostile))
    assert {tag for tag, _ in found} <= {tag for tag, _ in expected} | {"pre"}
    assert sum(tag == "script" for tag, _ in found) == 2
    assert not [name for _, attributes in found for name in attributes if name.startswith("on") or name == "style"]
    html = (hostile / "report.html").read_text()
    assert "pwned" in html and "pwned=1</script>" not in html
    addresses = re.findall(r"https?://[\w./]+", html)  # a namespace, and the library's name in its own comment
    assert set(addresses) == {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}
    policy = next(a["content"] for tag, a in found if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")


def test_page_stays_below_its_bound_and_is_made_in_seconds_when_the_run_was_long(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    line = {"step": 0, **{f"own_metric_{i}": 0.123456789 for i in range(30)}}
    with paths.metrics.open("w") as file:
        for step in range(1, 6_001):
            file.write(json.dumps({**line, "step": step, "loss": 1 / step}) + "\n")
    with paths.timeline.open("a") as file:
        for i in range(4_000):
            file.write(json.dumps({"t": 1_700_000_300 + i, "event": "progress", "step": i, "save_s": 0.1}) + "\n")
    began = time.process_time()
    html = page_of(paths.root)
    assert len(html.encode()) <= MAX_BYTES
    assert time.process_time() - began < 8


@pytest.mark.parametrize(
    "content", ["", "garbage", "null", "[]", "5", '{"a": {"b": NaN}}', '{"state": 5, "about": 3}', "\x00"]
)
@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.jsonl", "logs/timeline.jsonl", "logs/samples.jsonl"]
)
def test_odd_file_breaks_no_page(name: str, content: str, tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    (paths.root / name).write_text(content)
    (paths.root / "checkpoint-50").mkdir()
    assert "</html>" in page_of(paths.root)


@pytest.mark.parametrize(
    "line",
    [{"step": 1, "loss": float("nan")}, {"step": [], "loss": 1}, {"step": 1e308, "loss": 1e308}, {"step": True, "x": 1},
     {"step": 5, "checkpoint": [], "bytes": "x", "save_stall_s": float("inf")}, {"step": -3, "eval_loss": -1}],
)  # fmt: skip
def test_odd_metric_breaks_no_page(line: dict[str, Any], tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    with paths.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert data_of(page_of(paths.root))["charts"]


def test_run_without_timeline_has_curves_and_no_strip(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    paths.timeline.unlink(), paths.samples.unlink(), paths.config.unlink()
    html = page_of(paths.root)
    assert "Where the time went" not in html and data_of(html)["goodput"] is None


def test_sweep_is_ranked_and_says_what_mattered(tmp_path: Path) -> None:
    html = page_of(make_sweep(tmp_path / "sweep"))
    data = data_of(html)
    assert [axis["name"] for axis in data["parallel"]["axes"]] == ["optim.learning_rate", "seed", "eval_exact_match"]
    best = next(job for job in data["parallel"]["jobs"] if job["rank"] == 1)
    assert best["name"] == "lr=0.001,seed=2" and data["curves"][0]["name"] == best["name"]
    shares = re.findall(r'<span class="mono">([\w.]+)</span><svg.*?<span class="n">(\d+) %', html, re.DOTALL)
    assert shares[0][0] == "optim.learning_rate" and int(shares[0][1]) > 90 and int(shares[1][1]) < 10
    assert "stopped early" in html


def test_file_is_put_where_o_says_and_a_folder_without_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_run(tmp_path / "run").root
    assert cli.main(["report", str(root), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and not (root / "report.html").exists()
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    with pytest.raises(UserError, match="no run and no sweep"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be written"):
        report.main([str(root), "-o", str(tmp_path / "missing/page.html")])
    with pytest.raises(UserError, match="is a folder"):
        report.main([str(root), "-o", str(tmp_path)])


def test_link_in_the_place_of_the_page_leads_nowhere(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    RunPaths(paths.root).report.symlink_to(tmp_path / "precious")
    page_of(paths.root)
    assert (tmp_path / "precious").read_text() == "mine"


def test_no_spike_is_lost_when_a_curve_is_thinned(tmp_path: Path) -> None:
    points = [(float(i), 100.0 if i == 777 else float(i % 3)) for i in range(10_000)]
    kept = thinned(points, 200)
    assert len(kept) <= 202 and (777.0, 100.0) in kept and kept == sorted(kept) and kept[-1] == points[-1]
    paths = make_run(tmp_path / "run")
    assert len(read_metrics(paths.metrics).series["loss"]) == 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [(words.count(33_221), "33.2k"), (words.count(1_234_567), "1.23M"), (words.count(999_999), "1M"),
     (words.count(7), "7"), (words.duration(0.0312), "0.031 s"), (words.duration(59.7), "1 min 00 s"),
     (words.duration(3600 * 26), "1 d 02 h"),
     (words.size(1536), "1.54 KB"), (words.size(999_999_999), "1 GB"), (words.percent(0.9999), "99.9 %"),
     (words.percent(1), "100 %"),
     (words.metric(0.98828), "0.9883"), (words.metric(1.2344e-5), "1.234e-5"), (words.metric(123.456), "123.5")],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


def test_json_has_the_numbers_of_the_page_when_it_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert report.main([str(run.root), "--json"]) == 0 and not run.report.exists()
    told = json.loads(capsys.readouterr().out)
    assert told["best_step"] == 200 and told["best_metric"] == 1 and told["time"]["num_kills"] == 1
    assert sum(told["time"]["seconds"].values()) == pytest.approx(told["time"]["wall_s"])
    assert told["time"]["num_steps_trained_again"] == 20


def test_json_ranks_the_jobs_when_it_is_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(make_sweep(tmp_path / "sweep")), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = [job["best_metric"] for job in told["jobs"]]
    assert values == sorted(values, reverse=True) and told["importance"]["optim.learning_rate"] > 0.5


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`-o /dev/null` as root replaced the device, for everybody on the machine."""
    make_run(tmp_path / "run")
    fifo, link, page = tmp_path / "fifo", tmp_path / "link", tmp_path / "page.html"
    os.mkfifo(fifo)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(fifo)]) == 0
    reader.join(10)
    assert fifo.is_fifo() and got[0].endswith("</html>") and capsys.readouterr().out == ""
    page.touch()
    link.symlink_to(page)
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(link)]) == 0
    assert link.is_symlink() and page.read_text() == got[0]
