"""A plan for people: a table in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from typing import Any

from launcher.base.words import count, duration, size
from launcher.config.settings import RunConfig

_PARTS = ("weights", "gradients", "optimizer", "activations", "other", "total")


def show(config: RunConfig, plan: dict[str, Any]) -> None:
    """Prints it on stdout."""
    print(_heading(config, plan))
    header = ["strategy", *_PARTS, "fits", "largest micro-batch"]
    rows = [_row(entry, plan) for entry in plan["strategies"]]
    if sys.stdout.isatty():
        _print_table(header, rows, plan["strategy"])
    else:
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in _lines(config, plan):
        print(line)


def _heading(config: RunConfig, plan: dict[str, Any]) -> str:
    name = config.model.model_name_or_path or config.model.config.get("model_type", "model")
    trained, total = plan["num_trainable_parameters"], plan["num_parameters"]
    share = "" if trained == total else f", {count(trained)} trained"
    device = plan["device"]
    processes = f"{plan['num_processes']} process{'es' if plan['num_processes'] > 1 else ''}"
    return (
        f"{name}: {count(total)} parameters{share}; {config.model.dtype}, {processes}, micro-batch "
        f"{plan['per_device_train_batch_size']} of {plan['max_length']} tokens\n"
        f"Memory per device, of {size(device['bytes'])} ({device['source']}; {size(device['usable_bytes'])} usable):"
    )


def _row(entry: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    mark = " ←" if entry["name"] == plan["strategy"] else ""
    largest = str(entry["max_per_device_train_batch_size"])
    parts = [size(entry["memory_bytes"][name]) for name in _PARTS]
    return [f"{entry['name']}{mark}", *parts, "yes" if entry["fits"] else "no", largest]


def _print_table(header: list[str], rows: list[list[str]], chosen: str) -> None:
    from rich.table import Table

    from launcher.base.tables import print_whole

    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left")
    for row in rows:
        style = "bold" if row[0].split()[0] == chosen else ""
        fits = f"[green]{row[-2]}[/]" if row[-2] == "yes" else f"[red]{row[-2]}[/]"
        table.add_row(*row[:-2], fits, row[-1], style=style)
    print_whole(table, markup=True)


def _lines(config: RunConfig, plan: dict[str, Any]) -> list[str]:
    ck, host = plan["checkpoint_bytes"], plan["host_bytes_per_process"]
    disk = "every checkpoint is kept: how many is not known" if plan["disk_bytes"] is None else size(plan["disk_bytes"])
    found = [
        f"Host memory per process: {size(host['snapshot'])} for the copy of a save, {size(host['build'])} while the "
        f"model is built" + (f", {size(host['offloaded'])} offloaded" if host["offloaded"] else ""),
        f"Checkpoint: {size(ck['total'])}: model {size(ck['model'])}, fp32 masters {size(ck['masters'])}, optimizer "
        f"{size(ck['optimizer'])}. Disk over the run: {disk}",
        f"A save takes {duration(plan['save_s'])} in the background, an upload {duration(plan['upload_s'])}; with a "
        f"failure every {duration(plan['mtbf_s'])}: save every {duration(plan['recommended_save_every_s'])}",
    ]
    if plan["num_steps"] is not None:
        took = f", {duration(plan['train_s'])}" if plan["train_s"] is not None else ""
        found.append(f"{plan['num_steps']:,} steps, at most {count(plan['max_tokens'])} tokens{took}")
    return [*found, *(f"Note: {notice}" for notice in plan["notices"])]
