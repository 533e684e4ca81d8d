"""The page in a real browser: it draws, it complains about nothing, it asks for nothing, it runs nothing of a run's."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from launcher.cli import report
from tests.unit.report.folders import HOSTILE, make_run, make_sweep

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(_BROWSER is None, reason="no chromium here: apt-get install chromium")


class Shown:
    """What the browser made of a page."""

    def __init__(self, page: Path, folder: Path, *, size: str = "1280,1500", is_dark: bool = False) -> None:
        assert _BROWSER is not None
        picture = folder / "page.png"
        done = subprocess.run(
            [_BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
             "--no-first-run", "--disable-background-networking", "--virtual-time-budget=3000", f"--window-size={size}",
             *(["--blink-settings=preferredColorScheme=0"] if is_dark else []), "--enable-logging=stderr", "--v=0",
             f"--screenshot={picture}", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        self.dom = done.stdout
        self.console = re.findall(r"CONSOLE.*", done.stderr)
        self.colors = {color for _, color in Image.open(picture).convert("RGB").getcolors(2**22) or []}
        drawn = re.search(r'data-drawn="(\d+)"', self.dom)
        self.num_plots = int(drawn[1]) if drawn else 0


def rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def test_browser_tells_of_an_error_and_of_a_script_that_the_policy_refuses(tmp_path: Path) -> None:
    """That the other tests would see one."""
    root = make_run(tmp_path / "run").root
    report.main([str(root), "-q"])
    page = root / "report.html"
    page.write_text(page.read_text().replace("</main>", "<script>document.title='run'</script></main>"))
    shown = Shown(page, tmp_path)
    assert shown.console and "<title>a run</title>" in shown.dom


def test_curves_and_strip_are_drawn_without_a_word_on_the_console(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", hostile=HOSTILE).root
    report.main([str(root), "-q"])
    shown = Shown(root / "report.html", tmp_path)
    assert shown.console == []
    assert "data-pwned" not in shown.dom
    assert shown.num_plots == shown.dom.count("<canvas") == 6
    for color in ("#2a9d78", "#e0752d", "#df4a36", "#4d83e0"):  # loss, eval loss, trained again, evaluation
        assert rgb(color) in shown.colors, color


def test_page_is_dark_and_fits_a_phone(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run").root
    report.main([str(root), "-q"])
    frame = tmp_path / "phone.html"
    frame.write_text(f"<iframe src='{(root / 'report.html').as_uri()}' width='390' height='1400'></iframe>")
    shown = Shown(frame, tmp_path, size="500,1450", is_dark=True)
    assert shown.console == []
    assert {rgb("#121416"), rgb("#191c1f"), rgb("#3fbf95"), rgb("#f0624e")} <= shown.colors


def test_sweep_is_drawn(tmp_path: Path) -> None:
    root = make_sweep(tmp_path / "sweep", hostile=HOSTILE)
    report.main([str(root), "-q"])
    shown = Shown(root / "report.html", tmp_path)
    assert shown.console == [] and "data-pwned" not in shown.dom
    assert shown.num_plots == 1 and shown.dom.count("<path") >= 12
