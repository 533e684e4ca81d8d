"""`launcher report`: a run or a sweep as one HTML file that opens anywhere. Reads files only; imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher.base import files
from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.paths import RunPaths
from launcher.cli.report.curves import charts
from launcher.cli.report.page import MAX_BYTES, render
from launcher.sweep.jobs import is_sweep
from launcher.sweep.runs import is_run

_POINTS = (1200, 400, 120, 30)
"""Of each curve; the next smaller number where the page would be too large."""
_EPILOG = """examples:
  launcher report outputs/run              writes outputs/run/report.html
  launcher report outputs/sweep -o page.html
  launcher report outputs/run --json       its numbers: where the time went, the best, or a sweep's ranking

It is also written at each end of a run. One file of at most 2 MB: it needs no network and can be sent to anybody."""


def main(argv: list[str]) -> int:
    """Writes the page and says where; returns the exit code.

    Raises:
        UserError: there is no run or sweep, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="launcher report", description="A run or a sweep as one HTML page with plots.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="RUN_OR_SWEEP", help="the output_dir of a run or a sweep")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: RUN_OR_SWEEP/report.html")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing where it was written")
    parser.add_argument("--json", action="store_true", help="write no page; print its numbers, for a script")
    options = parser.parse_args(argv)
    root: Path = options.folder.expanduser()
    if not (root.is_dir() and (is_sweep(root) or is_run(root))):
        raise UserError(f"{options.folder} is no run and no sweep. Give the output_dir of one")
    if options.json:
        from launcher.cli.report.summary import summary

        print(json.dumps(summary(root), indent=1))
        return EXIT_DONE
    target = options.output.expanduser() if options.output else RunPaths(root).report
    if target.is_dir():
        raise UserError(f"-o {options.output} is a folder. Name a file in it: -o {target / RunPaths(root).report.name}")
    write_page(root, target, within=None if options.output else root)
    if not options.quiet and target.is_file():
        print(target)
        print(f"{target.stat().st_size / 1000:,.0f} KB; open it in a browser", file=sys.stderr)
    return EXIT_DONE


def write_page(root: Path, target: Path, *, within: Path | None = None) -> None:
    """Writes the page of a run or sweep, atomically. A device or a pipe that somebody names is not replaced.

    Raises:
        UserError: it cannot be written there.
    """
    html = _render(root.resolve())
    try:
        if within is None and target.exists() and not target.is_file():
            target.write_bytes(html.encode())
        else:
            path = target.resolve() if within is None else target  # /dev/stdout may be a file
            files.replace_file(path, html.encode(), within=within)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}. Another place: -o FILE") from error


def _render(root: Path) -> str:
    if is_sweep(root):
        from launcher.cli.report import sweep_page

        page = sweep_page.read_page(root)
        return render(page, {key: page[key] for key in ("curves", "parallel")})
    from launcher.cli.report import run_page

    page, metrics = run_page.read_page(root)
    data = {key: page[key] for key in ("goodput", "bands", "total_steps")}
    html = ""
    for limit in _POINTS:
        html = render(page, {**data, "charts": charts(metrics, limit)})
        if len(html.encode()) <= MAX_BYTES:
            break
    return html
