"""The model card: README.md with our part between markers, so that the user's own text is never overwritten."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, EvalResult, ModelCardData, RepoCard

from launcher.base import files, json_lines
from launcher.base.errors import UnsafeFileError
from launcher.base.inner_files import read_json_object
from launcher.base.paths import RunPaths
from launcher.config.settings import is_local_path
from launcher.hub import metadata
from launcher.hub.curve import draw_curve
from launcher.hub.faults import redact
from launcher.hub.items import Item, UploadSettings
from launcher.hub.layout import best_step

BEGIN = "<!-- launcher:begin (written at every push; put your own text above or below) -->"
END = "<!-- launcher:end -->"
CURVE = "loss_curve.png"
MAX_CURVE_POINTS = 1000
_MAX_TEXT_BYTES = 2**20
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_OURS = re.compile(r"<!-- launcher:begin.*?<!-- launcher:end -->", re.DOTALL)
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "huggingface_hub")
_SETTINGS = (
    "optim.name",
    "optim.learning_rate",
    "optim.weight_decay",
    "scheduler.lr_scheduler_type",
    "scheduler.warmup_steps",
    "train.train_batch_size",
    "train.max_steps",
    "train.num_train_epochs",
    "train.max_grad_norm",
    "data.max_length",
    "data.packing",
    "model.dtype",
    "strategy.name",
    "seed",
)


@dataclass(frozen=True)
class Card:
    """README.md and what belongs to it; `metadata` is our part of the header."""

    text: str
    metadata: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunFacts:
    """What the run's folder tells: the composed config (open dict), eval lines by step, (step, loss) points.

    `last_step`, `best_step`: of a run that is finished, as run.json says.
    """

    run_dir: Path
    config: dict[str, Any]
    evals: dict[int, dict[str, Any]]
    train_points: list[tuple[float, float]]
    last_step: int | None = None
    best_step: int | None = None

    def get(self, key: str) -> Any:
        """The value of a dotted key, None where there is none."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def hub_id(self, name: Any) -> str | None:
        """A name that is a repository's; None for a local path, which the Hub would refuse and nobody could follow.

        A relative path was relative to the folder that the run was started in: some folder above its own.
        """
        if not metadata.is_hub_id(name) or is_local_path(name):
            return None
        return None if any((parent / name).exists() for parent in self.run_dir.absolute().parents) else str(name)


def read_facts(run_dir: Path) -> RunFacts:
    """Reads config.yaml, metrics.jsonl and run.json; whatever is missing or broken is left out."""
    paths = RunPaths(run_dir)
    try:
        config = _parsed(files.read_text(paths.config, _MAX_TEXT_BYTES))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        config = {}
    evals: dict[int, dict[str, Any]] = {}
    train: list[tuple[float, float]] = []
    for line in json_lines.read(paths.metrics):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in line and _is_finite(line["loss"]):
            train.append((step, line["loss"]))
        if any(key.startswith("eval_") for key in line):
            evals.setdefault(step, {}).update({k: v for k, v in line.items() if k.startswith("eval_") or k == "epoch"})
    told = files.read_json_or(paths.run_state, {})
    last, best = (v if type(v := told.get(k)) is int else None for k in ("step", "best_step"))
    if told.get("state") != "finished" or last is None:
        last = best = None
    return RunFacts(run_dir, config if isinstance(config, dict) else {}, evals, train, last, best)


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """The same text at every push of a run, and Python's parser takes long."""
    return yaml.safe_load(text)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def build_card(
    settings: UploadSettings,
    repo_id: str,
    items: Sequence[Item],
    steps: list[int],
    existing: str | None,
    sent_last: dict[str, Any],
    level: int = 0,
) -> Card:
    """The README to commit together with `items`.

    Args:
        steps: of the checkpoints that the repository will hold.
        existing: the README that is there now.
        level: 1 leaves out every header entry that the Hub could refuse.
    """
    run_dir = Path(settings.run_dir)
    facts = read_facts(run_dir)
    data, notices = _card_data(facts, repo_id, items, level)
    ours = data.to_dict()
    theirs, body = split(_own_readme(run_dir) if existing is None else existing)
    header = metadata.merge(theirs, ours, sent_last.get("metadata") or {})
    points = [(s, e["eval_loss"]) for s, e in sorted(facts.evals.items()) if _is_finite(e.get("eval_loss"))]
    pictures = {}
    if facts.train_points or points:
        thin = facts.train_points[:: 1 + len(facts.train_points) // MAX_CURVE_POINTS]
        pictures[CURVE] = draw_curve(thin, points)
    is_alone = not _OURS.sub("", body).strip()
    step, metrics = _results(facts, items)
    section = _template().render(
        repo_id=repo_id, is_alone=is_alone, curve=CURVE, has_curve=bool(pictures),
        base=data.base_model, is_fine_tuned=bool(facts.get("model.model_name_or_path")), data_sets=_datasets(facts),
        is_adapter=_is_adapter(items), is_chat=_has_chat_template(items), measured_step=step, metrics=metrics,
        checkpoints=_checkpoints(settings, facts, items, steps), versions=_versions(),
        run_settings={key: value for key in _SETTINGS if isinstance(value := facts.get(key), (str, int, float))},
    )  # fmt: skip
    text = f"---\n{CardData(**header).to_yaml()}\n---\n{place(body, redact(section.strip()))}"
    return Card(text, ours, pictures, notices)


@functools.cache
def _template() -> jinja2.Template:
    template: jinja2.Template = jinja2.Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template


def _own_readme(run_dir: Path) -> str:
    try:
        return files.read_text(run_dir / "README.md", _MAX_TEXT_BYTES)
    except (OSError, ValueError):
        return ""


def split(text: str) -> tuple[dict[str, Any], str]:
    """The header's entries and the body of a README; a header that is no metadata stays part of the body."""
    if not text.startswith("---"):
        return {}, text
    try:
        card = RepoCard(text)  # which keeps every entry as it stands there
        return card.data.to_dict(), card.text
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError):
        return {}, text


def place(body: str, section: str) -> str:
    """Replaces what is between the markers, or adds it at the end; everything else stays byte for byte."""
    ours = f"{BEGIN}\n{section}\n{END}"
    if _OURS.search(body):
        return _OURS.sub(lambda _: ours, body, count=1)
    if not body.strip():
        return f"\n{ours}\n"
    return f"{body.rstrip()}\n\n{ours}\n"


def _is_adapter(items: Sequence[Item]) -> bool:
    return any(f.path == "adapter_config.json" for item in items for f in item.files)


def _card_data(facts: RunFacts, repo_id: str, items: Sequence[Item], level: int) -> tuple[ModelCardData, list[str]]:
    """Our part of the header, and what to tell the user about it."""
    data = ModelCardData(
        library_name="peft" if _is_adapter(items) else "transformers", pipeline_tag="text-generation", tags=["launcher"]
    )
    if level > 0:
        return data, ["the Hub refused the card's header; it was sent without"]
    notices: list[str | None] = []
    data.tags = list(dict.fromkeys(["launcher", *_texts(facts.get("hub.tags"))]))
    if isinstance(name := facts.get("hub.license"), str) and name:
        entries, notice = metadata.checked_license(name)
        data.license, data.license_name = entries["license"], entries.get("license_name")
        notices.append(notice)
    languages, notice = metadata.checked_languages(_texts(facts.get("hub.language")))
    notices.append(notice)
    data.language = languages or None
    data.base_model = facts.hub_id(facts.get("model.model_name_or_path"))
    data.datasets = _datasets(facts) or None
    _, metrics = _results(facts, items)
    data.model_name = repo_id.rpartition("/")[2] if metrics else None
    data.eval_results = [_eval_result(data.datasets, *m) for m in metrics.items()] or None
    return data, [n for n in notices if n]


def _texts(value: Any) -> list[str]:
    # Texts only: of lists that hold each other (YAML's aliases) the text could fill the memory.
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _eval_result(datasets: list[str] | None, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation", task_name="Text Generation",
        dataset_type=datasets[0] if datasets else "custom", dataset_name=datasets[0] if datasets else "evaluation set",
        metric_type=re.sub(r"[^a-z0-9_-]+", "_", name.removeprefix("eval_").lower()), metric_value=value,
        metric_name=name,
    )  # fmt: skip


def _datasets(facts: RunFacts) -> list[str]:
    sources = facts.get("data.sources")
    listed = sources if isinstance(sources, list) else []
    names = [facts.get("data.dataset_name"), *(s.get("dataset_name") for s in listed if isinstance(s, dict))]
    return list(dict.fromkeys(found for name in names if (found := facts.hub_id(name))))


def _results(facts: RunFacts, items: Sequence[Item]) -> tuple[int | None, dict[str, float]]:
    """The step and eval values of the model at the top: the best one's at the end, else the newest checkpoint's."""
    newest = items[-1]
    steps = sorted(facts.evals)
    step = newest.step
    if newest.kind != "checkpoint" and facts.get("checkpoint.load_best_model_at_end"):
        step = _best_saved(facts) or facts.last_step
    if step not in facts.evals:
        earlier = [s for s in steps if step is None or s <= step]
        step = earlier[-1] if earlier else None
    values = facts.evals.get(step, {}) if step is not None else {}
    return step, {k: v for k, v in values.items() if k.startswith("eval_") and k != "eval_runtime_s" and _is_finite(v)}


def _best_saved(facts: RunFacts) -> int | None:
    """The step of the best checkpoint. Once the run has ended, run.json knows it: what was measured best may never have
    been saved."""
    return _best_by_metric(facts) if facts.last_step is None else facts.best_step


def _best_by_metric(facts: RunFacts) -> int | None:
    name = str(facts.get("checkpoint.metric_for_best_model") or "loss")
    key = name if name.startswith("eval_") else f"eval_{name}"
    is_greater = facts.get("checkpoint.greater_is_better")
    sign = 1 if (is_greater if is_greater is not None else not name.endswith("loss")) else -1
    scored = [(sign * e[key], -s) for s, e in facts.evals.items() if _is_finite(e.get(key))]
    return -max(scored)[1] if scored else None


def _has_chat_template(items: Sequence[Item]) -> bool:
    for item in items:
        if any(f.path == "chat_template.jinja" for f in item.files):
            return True
        try:
            if read_json_object(item.source("tokenizer_config.json")).get("chat_template"):
                return True
        except (OSError, ValueError, UnsafeFileError):
            continue
    return False


def _checkpoints(
    settings: UploadSettings, facts: RunFacts, items: Sequence[Item], steps: list[int]
) -> list[dict[str, Any]]:
    """The rows of the table that says which step is what."""
    if settings.strategy not in ("checkpoint", "all_checkpoints"):
        return []
    best, rows = best_step(items) or _best_saved(facts), []
    for step in steps:
        values = facts.evals.get(step, {})
        epoch, loss = (f"{v:.4g}" if _is_finite(v := values.get(k)) else "" for k in ("epoch", "eval_loss"))
        where = (
            "`last-checkpoint/`" if settings.strategy == "checkpoint" else f"`checkpoint-{step}/`, tag `step-{step}`"
        )
        rows.append({"step": step, "epoch": epoch, "eval_loss": loss, "where": where, "is_best": step == best})
    return rows


@functools.cache
def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
