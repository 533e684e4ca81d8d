"""What the report of one run shows, read from its folder. No value is trusted: types are checked here, and the page
escapes every text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.base import files, json_lines, manifest, words
from launcher.base.errors import DamagedCheckpointError
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.base.secrets import redacted
from launcher.base.timeline import read_timeline
from launcher.cli.report.curves import Metrics, number, read_metrics
from launcher.cli.report.goodput import KINDS, OFF, Goodput, work_out
from launcher.cli.status import run_metric
from launcher.config.settings import RunConfig, to_dict
from launcher.sweep.runs import RUNNING, Metric, RunStatus, read_run

_MAX_SEGMENTS = 3000
_MAX_ROWS = 300
_MAX_TEXT = 600
_SAMPLE_BYTES = 16 * 2**20
_MAX_PROMPTS, _MAX_EVALUATIONS = 4, 8
_VERDICTS = {"True": "right", "False": "wrong"}
_KIND_NAMES = {
    "productive": "training", "evaluation": "evaluation", "save": "save stalls", "startup": "start-up",
    "lost": "trained again", "queue": "waiting in the queue", "down": "down after a kill",
    "finish": "publishing", "off": "switched off",
}  # fmt: skip
_STATE_WORDS = {"running": "running", "finished": "finished", "failed": "failed", "pruned": "pruned"}


def text(value: Any, limit: int = _MAX_TEXT) -> str:
    """Any value as a text of bounded length without control characters; secrets that slipped in are taken out."""
    shown = redacted(str(value)[: limit * 2])
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in shown)
    return shown if len(shown) <= limit else shown[:limit] + "…"


def read_page(root: Path, now: float | None = None) -> tuple[dict[str, Any], Metrics]:
    """All of it but the curves, and what those are drawn from."""
    paths = RunPaths(root)
    judged_by = run_metric(root)
    status, info, config = read_run(root, judged_by), files.read_json_or(paths.run_state, {}), read_config(paths)
    metrics = read_metrics(paths.metrics)
    best = best_of(metrics, judged_by, info)
    checkpoints = list(checkpoint_rows(paths, metrics, best, judged_by))
    lines = list(read_timeline(paths))
    is_alive = status.state == RUNNING
    goodput = work_out(
        lines, now=(now or time.time()) if is_alive else None,
        saved_step=max((row["step"] for row in checkpoints if row["is_kept"]), default=0),
    )  # fmt: skip
    name = text(config.get("run_name") or root.name, 120)
    page = {
        "kind": "run", "name": name, "title": name, "folder": text(root), "state": state_of(status),
        "state_text": state_text(status), "made_at": datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        "version": __version__, "subtitle": subtitle(config, info, status),
        "figures": list(figures(status, metrics, best, judged_by, goodput)),
        "goodput": goodput_data(goodput) if goodput is not None else None,
        "parts": parts(goodput) if goodput is not None else [],
        "retrained": retrained(lines, metrics, goodput),
        "has_charts": bool(metrics.series), "checkpoints": checkpoints, "best_by": text(judged_by.key, 80),
        "settings": settings_rows(config), "versions": versions(info), "samples": samples(paths),
        "bands": bands(goodput) if goodput is not None else [], "error": text(info.get("error") or "", 2000),
        "total_steps": status.total_steps,
    }  # fmt: skip
    return page, metrics


# --------------------------------------------------------------------------- the head


def state_of(status: RunStatus) -> str:
    """By which the page colours it."""
    if status.state == "interrupted":
        return "crashed" if status.reason in ("crash", "hang") else "stopped"
    return _STATE_WORDS.get(status.state, "other")


def state_text(status: RunStatus) -> str:
    shown = "stopped" if status.state == "interrupted" else status.state
    reason = f" ({status.reason})" if status.reason else ""
    return text(f"{shown}{reason}", 60)


def subtitle(config: Mapping[str, Any], info: Mapping[str, Any], status: RunStatus) -> list[str]:
    """Model, data, processes, host, in a few words each."""
    about = _group(info, "about")
    model, data = _group(config, "model"), _group(config, "data")
    name = model.get("model_name_or_path") or f"{_group(model, 'config').get('model_type', 'model')} from scratch"
    found = [text(name, 80)]
    if (parameters := number(about.get("num_parameters"))) is not None:
        found.append(f"{words.count(parameters)} parameters")
    source = data.get("dataset_name") or next(iter(data.get("train_files") or []), None)
    if source is None and _group(data, "generator"):
        source = str(_group(data, "generator").get("_target_", "")).rpartition(".")[2]
    if source:
        found.append(text(source, 80))
    world = info.get("world_size")
    processes = f"{world} process{'es' if world != 1 else ''}" if isinstance(world, int) else ""
    found.append(" · ".join(filter(None, (text(_group(config, "strategy").get("name", ""), 20), processes))))
    found.append(text(status.host or "", 80) + (f", job {text(status.job_id, 40)}" if status.job_id else ""))
    return [part for part in found if part]


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def best_of(metrics: Metrics, by: Metric, info: Mapping[str, Any]) -> tuple[int, float] | None:
    """Step and value of the best checkpoint: as run.json says, else the best evaluated step that was saved."""
    points = metrics.series.get(by.key, [])
    told = number(info.get("best_step"))
    if told is not None and (value := dict(points).get(told)) is not None:
        return int(told), value
    saved = {number(line.get("step")) for line in metrics.saves}
    known = [p for p in points if p[0] in saved] or (points if by.key != "loss" else [])
    if not known:
        return None
    step, value = min(known, key=lambda p: by.rank(p[1]))
    return int(step), value


def figures(
    status: RunStatus, metrics: Metrics, best: tuple[int, float] | None, by: Metric, goodput: Goodput | None
) -> Iterator[dict[str, str]]:
    """The few large numbers at the top: name, value, unit, note."""
    if best is not None:
        name = text(by.key.removeprefix("eval_").replace("_", " "), 40)
        note = f"at step {best[0]:,}" + (
            ", from " + words.metric(metrics.series[by.key][0][1]) if by.key in metrics.series else ""
        )
        yield {"name": f"best {name}", "value": words.metric(best[1]), "unit": "", "note": note}
    elif (loss := metrics.last("loss")) is not None:
        note = f"from {words.metric(metrics.series['loss'][0][1])}"
        yield {"name": "loss", "value": words.metric(loss), "unit": "", "note": note}
    total = f"of {status.total_steps:,}" if status.total_steps else ""
    epoch = f", epoch {status.epoch:.3g}" if status.epoch is not None else ""
    yield {"name": "steps", "value": f"{status.step:,}", "unit": "", "note": f"{total}{epoch}".lstrip(", ")}
    if (speed := metrics.series.get("tokens_per_second")) is not None:
        middle = sorted(value for _, value in speed)[len(speed) // 2]
        seen = f"{words.count(metrics.num_tokens)} tokens in all" if metrics.num_tokens else ""
        yield {"name": "throughput", "value": words.count(middle), "unit": "tokens/s", "note": seen}
    if goodput is not None and goodput.share is not None:
        share = words.percent(goodput.share)
        note = f"of {words.duration(goodput.wall_s - goodput.total_s(OFF))} spent training"
        yield {"name": "goodput", "value": share.removesuffix(" %"), "unit": "%", "note": note}
        again = goodput.num_retrained
        lost = f"{again} step{'s' if again != 1 else ''} trained again" if again else "no step trained twice"
        yield {
            "name": "kills survived" if status.state in ("finished", RUNNING) else "kills",
            "value": str(goodput.num_kills), "unit": "", "note": lost,
        }  # fmt: skip


# --------------------------------------------------------------------------- goodput


def parts(goodput: Goodput) -> list[dict[str, str]]:
    """The legend: each kind of time with its length and share; they add up."""
    wall_s = goodput.wall_s or 1.0
    found = [(kind, goodput.total_s(kind)) for kind in KINDS]
    return [
        {
            "kind": kind, "name": _KIND_NAMES[kind], "time": words.duration(spent_s),
            "share": words.percent(spent_s / wall_s),
        }
        for kind, spent_s in found if spent_s > 0
    ]  # fmt: skip


def goodput_data(goodput: Goodput) -> dict[str, Any]:
    """For the drawing: seconds since the beginning."""
    zero = goodput.segments[0].start if goodput.segments else 0.0
    smallest_s = goodput.wall_s / _MAX_SEGMENTS if len(goodput.segments) > _MAX_SEGMENTS else 0.0
    shown: list[list[Any]] = []
    for segment in goodput.segments:  # what is thinner than a hair is drawn with the one before it
        if shown and (segment.end - segment.start < smallest_s or shown[-1][2] == segment.kind):
            shown[-1][1] = round(segment.end - zero, 2)
        else:
            shown.append([round(segment.start - zero, 2), round(segment.end - zero, 2), segment.kind])
    return {
        "segments": shown, "wall_s": round(goodput.wall_s, 2), "names": _KIND_NAMES,
        "marks": [[round(m.t - zero, 2), m.kind, text(m.text, 160)] for m in goodput.marks[-200:]],
        "steps": [
            [[round(t - zero, 2), step] for t, step in _every(points, 400)] for points in goodput.steps[-200:] if points
        ],
    }  # fmt: skip


def _every(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    stride = -(-len(points) // limit)
    return [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]


def bands(goodput: Goodput) -> list[list[float]]:
    """Steps that were trained twice: from the one gone on from to the one that had been reached."""
    found = []
    for before, after in zip(goodput.steps, goodput.steps[1:], strict=False):
        if before and after and before[-1][1] > after[0][1]:
            found.append([after[0][1], before[-1][1]])
    return found[-100:]


def retrained(lines: list[dict[str, Any]], metrics: Metrics, goodput: Goodput | None) -> dict[str, int] | None:
    """How many logged losses of steps that were trained twice are known of both times, and how many are equal."""
    now = dict(metrics.series.get("loss", []))
    num_compared = num_equal = 0
    for line in lines:
        losses = line.get("losses") if line["event"] == "undone" else None
        for pair in losses if isinstance(losses, list) else []:
            step, loss = (number(v) for v in pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
            if step is not None and loss is not None and step in now:
                num_compared += 1
                num_equal += now[step] == loss
    return {"compared": num_compared, "equal": num_equal} if num_compared and goodput is not None else None


# --------------------------------------------------------------------------- checkpoints


def checkpoint_rows(
    paths: RunPaths, metrics: Metrics, best: tuple[int, float] | None, by: Metric
) -> Iterator[dict[str, Any]]:
    """One row for every checkpoint that was committed, kept or not, by rising step."""
    from launcher.hub import pushed_checkpoints

    kept = dict(paths.checkpoint_dirs())
    pushed = pushed_checkpoints(paths)
    saves = {int(step): line for line in metrics.saves if (step := number(line.get("step"))) is not None}
    values = dict(metrics.series.get(by.key, []))
    steps = sorted({*kept, *saves, *pushed})
    shown = {*kept, *steps[-_MAX_ROWS:]}
    newest = max(kept, default=None)
    for step in (step for step in steps if step in shown):
        line = saves.get(step, {})
        found = _manifest(kept[step]) if step in kept else None
        size = found.total_bytes if found is not None else number(line.get("bytes"))
        weights = [f for f in found.files if f.role == "weights"] if found is not None else []
        value = values.get(float(step))
        yield {
            "name": f"checkpoint-{step}", "step": step, "is_kept": found is not None,
            "is_best": best is not None and best[0] == step, "is_latest": step == newest,
            "commit": text(pushed[step], 64) if step in pushed else "", "on_hub": step in pushed,
            "metric": words.metric(value) if value is not None else "",
            "size": words.size(size) if size else "", "sha256": weights[0].sha256 if len(weights) == 1 else "",
            "num_weights": len(weights),
            "stall": _seconds(line, "save_stall_s"), "write": _seconds(line, "save_write_s"),
            "note": "" if step not in kept or found is not None else "not whole",
        }  # fmt: skip


def _seconds(line: Mapping[str, Any], key: str) -> str:
    value = number(line.get(key))
    return words.duration(value) if value is not None else ""


def _manifest(folder: Path) -> manifest.Manifest | None:
    try:
        return manifest.read(CheckpointPaths(folder).root)
    except (OSError, DamagedCheckpointError):
        return None


# --------------------------------------------------------------------------- settings, versions, samples


def read_config(paths: RunPaths) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(files.read_text(paths.config))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def settings_rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every setting by its key, with the default where it is another one."""
    if not config:
        return []
    defaults = dict(_flat(to_dict(RunConfig())))
    rows = []
    for key, value in list(_flat(config))[:2000]:
        is_changed = key not in defaults or defaults[key] != value
        rows.append(
            {
                "key": text(key, 120), "value": text(_shown(value)), "is_changed": is_changed,
                "default": text(_shown(defaults[key])) if is_changed and key in defaults else "",
            }
        )  # fmt: skip
    return rows


def _flat(config: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value and depth < 20:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value)


def versions(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    about = info.get("about")
    found = about.get("versions") if isinstance(about, dict) else None
    rows = [(text(k, 40), text(v, 120)) for k, v in list(found.items())[:40]] if isinstance(found, dict) else []
    device = about.get("device") if isinstance(about, dict) else None
    return [*rows, ("device", text(device, 120))] if device else rows


def samples(paths: RunPaths) -> list[dict[str, Any]]:
    """What the model wrote: a few prompts, each with its answers over the evaluations."""
    by_prompt: dict[str, dict[float, dict[str, Any]]] = {}
    try:
        if paths.samples.stat().st_size > _SAMPLE_BYTES:
            return []
    except OSError:
        return []
    for line in json_lines.read(paths.samples):
        step, prompt = number(line.get("step")), line.get("prompt")
        if step is None or not isinstance(prompt, str) or not isinstance(line.get("answer"), str):
            continue
        if prompt in by_prompt or len(by_prompt) < _MAX_PROMPTS:
            by_prompt.setdefault(prompt, {})[step] = line  # the last one of a step: it may have been trained again
    found = []
    for prompt, answers in by_prompt.items():
        steps = sorted(answers)
        chosen = sorted({steps[round(i * (len(steps) - 1) / (_MAX_EVALUATIONS - 1))] for i in range(_MAX_EVALUATIONS)})
        rows = [
            {
                "step": f"{step:,.0f}", "answer": text(answers[step]["answer"]) or "(nothing)",
                "verdict": _VERDICTS.get(str(answers[step].get("is_right")), ""),
            }
            for step in chosen
        ]  # fmt: skip
        expected = next((line["expected"] for line in answers.values() if isinstance(line.get("expected"), str)), "")
        found.append({"prompt": text(prompt), "expected": text(expected), "rows": rows})
    return found
