"""`launcher doctor`: what of this machine would stop or slow a run, and the command that mends it. Imports no torch.

Each check is a generator of `Finding`s in one of the modules here; one that fails itself is a warning, no traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from launcher.base.errors import EXIT_DONE, EXIT_FAILED
from launcher.base.text import printable
from launcher.cli.arguments import parse_settings
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.cli.train import as_argv
from launcher.config.compose import compose_arguments
from launcher.config.settings import RunConfig

_EPILOG = """examples:
  launcher doctor                                  this machine, and the folder outputs/
  launcher doctor output_dir=/shared/runs/a strategy=zero3 hub.push_to_hub=true
  launcher doctor --fix                            remove what an interrupted build left behind
  srun --ntasks-per-node=1 launcher doctor launch.num_machines=2 output_dir=/shared/runs/a

Takes the same overrides as `launcher train`: they say which folder, engine, tracker and machines are meant.
Exit codes: 0 nothing is wrong (there may be warnings), 1 something is an error, 2 the overrides are wrong."""
_MARKS = {OK: ("✓", "green"), WARNING: ("!", "yellow"), ERROR: ("✗", "red")}


def main(argv: Sequence[str]) -> int:
    """Prints a line per check, with the command that mends what is wrong; returns the exit code.

    Raises:
        LauncherError: the overrides are wrong.
    """
    parser = argparse.ArgumentParser(
        prog="launcher doctor", usage="launcher doctor [--json] [--fix] [OVERRIDE…]",
        description="The machine, versions, devices, what is missing and the command that mends it.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for a script: {ok, findings: [{name, status, text, fix}]}")
    parser.add_argument("--fix", action="store_true", help="mend what can be mended without asking")
    options, arguments = parse_settings(parser, argv)
    config = compose_arguments(as_argv(arguments))
    findings = list(examine(config, fix=options.fix))
    if options.json:
        print(json.dumps({"ok": not _has_errors(findings), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _show(findings)
    return EXIT_FAILED if _has_errors(findings) else EXIT_DONE


def examine(config: RunConfig, *, fix: bool) -> Iterable[Finding]:
    """Everything there is to say about this machine for this config, in the order of a run's life."""
    from launcher.cli.doctor import devices, machines, network, services, software

    checks: tuple[tuple[str, Callable[[RunConfig], Iterable[Finding]]], ...] = (
        ("python", software.python_and_packages),
        ("environment", software.environment),
        ("devices", devices.devices),
        ("memory", devices.memory),
        ("operators", lambda config: devices.operators(config, fix=fix)),
        ("output_dir", services.output_folder),
        ("disk", services.disks),
        ("network", network.interfaces),
        ("hub", services.hub),
        ("tracker", services.tracker),
        ("slurm", services.slurm),
        ("machines", machines.machines),
    )  # fmt: skip
    for name, check in checks:
        try:
            yield from check(config)
        except Exception as error:  # a check must not hide the others
            yield Finding(name, WARNING, f"could not be checked: {type(error).__name__}: {error}")


def _has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.status == ERROR for finding in findings)


def _show(findings: Sequence[Finding]) -> None:
    counts = {status: sum(f.status == status for f in findings) for status in (ERROR, WARNING)}
    summary = ", ".join(f"{n} {status}{'s' if n != 1 else ''}" for status, n in counts.items() if n) or "all is well"
    width = max(len(finding.name) for finding in findings)
    if not sys.stdout.isatty():
        for finding in findings:
            print(f"{finding.status:<7} {finding.name:<{width}}  {printable(finding.text)}")
            if finding.fix:
                print(f"{'':<7} {'':<{width}}  → {printable(finding.fix)}")
        print(summary)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark, style = _MARKS[finding.status]
        text = Text(printable(finding.text))
        if finding.fix:
            text.append(f"\n→ {printable(finding.fix)}", "cyan")
        table.add_row(Text(mark, style), Text(finding.name, "bold"), text)
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(summary, "red" if counts[ERROR] else "yellow" if counts[WARNING] else "green"))
