"""The model card: README.md with our part between markers, so that the user's own text is never overwritten."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.base import files
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
_OURS = re.compile(r"<!-- launcher:begin.*?<!-- launcher:end -->", re.DOTALL)
_HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
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
    """What the run's folder tells: the composed config (open dict), eval lines by step, (step, loss) points."""

    config: dict[str, Any]
    evals: dict[int, dict[str, Any]]
    train_points: list[tuple[float, float]]

    def get(self, key: str) -> Any:
        """The value of a dotted key, None where there is none."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_facts(run_dir: Path) -> RunFacts:
    """Reads config.yaml and metrics.jsonl; whatever is missing or broken is left out."""
    paths = RunPaths(run_dir)
    try:
        config = yaml.safe_load(paths.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        config = {}
    evals: dict[int, dict[str, Any]] = {}
    train: list[tuple[float, float]] = []
    for line in files.read_json_lines(paths.metrics):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in line and _is_finite(line["loss"]):
            train.append((step, line["loss"]))
        if any(key.startswith("eval_") for key in line):
            evals.setdefault(step, {}).update({k: v for k, v in line.items() if k.startswith("eval_") or k == "epoch"})
    return RunFacts(config if isinstance(config, dict) else {}, evals, train)


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
    ours, notices = _header(facts, repo_id, items, level)
    if existing is None:
        existing = _own_readme(run_dir)
    theirs, body = split(existing or "")
    last = sent_last.get("metadata") or {}
    header = metadata.merge(theirs, ours, last)
    points = [(s, e["eval_loss"]) for s, e in sorted(facts.evals.items()) if _is_finite(e.get("eval_loss"))]
    pictures = {}
    if facts.train_points or points:
        thin = facts.train_points[:: 1 + len(facts.train_points) // MAX_CURVE_POINTS]
        pictures[CURVE] = draw_curve(thin, points)
    section = redact(_section(settings, facts, repo_id, items, steps, is_alone=not _OURS.sub("", body).strip()))
    text = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{place(body, section)}"
    return Card(text, ours, pictures, notices)


def _own_readme(run_dir: Path) -> str | None:
    try:
        return (run_dir / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def split(text: str) -> tuple[dict[str, Any], str]:
    """The header's entries and the body of a README; a header that is no YAML mapping stays part of the body."""
    match = _HEADER.match(text)
    if not match:
        return {}, text
    try:
        header = yaml.safe_load(match[1])
    except yaml.YAMLError:
        header = None
    return (header, text[match.end() :]) if isinstance(header, dict) else ({}, text)


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


def _header(facts: RunFacts, repo_id: str, items: Sequence[Item], level: int) -> tuple[dict[str, Any], list[str]]:
    header: dict[str, Any] = {"library_name": "peft" if _is_adapter(items) else "transformers"}
    header |= {"pipeline_tag": "text-generation", "tags": ["launcher"]}
    if level > 0:
        return header, ["the Hub refused the card's header; it was sent without"]
    notices: list[str] = []
    tags = facts.get("hub.tags")
    header["tags"] = list(dict.fromkeys(["launcher", *(str(t) for t in tags or [])]))
    if name := facts.get("hub.license"):
        entries, notice = metadata.checked_license(str(name))
        header |= entries
        notices += [notice] if notice else []
    languages, notice = metadata.checked_languages([str(n) for n in facts.get("hub.language") or []])
    notices += [notice] if notice else []
    if languages:
        header["language"] = languages
    base = facts.get("model.model_name_or_path")
    if metadata.is_hub_id(base) and not is_local_path(base):
        header["base_model"] = base
    datasets = _datasets(facts)
    if datasets:
        header["datasets"] = datasets
    _, metrics = _results(facts, items)
    if index := metadata.model_index(repo_id, datasets[0] if datasets else "evaluation set", metrics):
        header["model-index"] = index
    return header, notices


def _datasets(facts: RunFacts) -> list[str]:
    sources = facts.get("data.sources")
    names = [facts.get("data.dataset_name"), *(s.get("dataset_name") for s in sources or [] if isinstance(s, dict))]
    return list(dict.fromkeys(n for n in names if metadata.is_hub_id(n) and not is_local_path(n)))


def _results(facts: RunFacts, items: Sequence[Item]) -> tuple[int | None, dict[str, float]]:
    """The step and eval values of the model at the top: the best one's at the end, else the newest checkpoint's."""
    newest = items[-1]
    steps = sorted(facts.evals)
    step = newest.step
    if newest.kind == "final" and facts.get("checkpoint.load_best_model_at_end"):
        step = _best_by_metric(facts)
    if step not in facts.evals:
        earlier = [s for s in steps if step is None or s <= step]
        step = earlier[-1] if earlier else None
    values = facts.evals.get(step, {}) if step is not None else {}
    return step, {k: v for k, v in values.items() if k.startswith("eval_") and _is_finite(v)}


def _best_by_metric(facts: RunFacts) -> int | None:
    name = str(facts.get("checkpoint.metric_for_best_model") or "loss")
    key = name if name.startswith("eval_") else f"eval_{name}"
    is_greater = facts.get("checkpoint.greater_is_better")
    sign = 1 if (is_greater if is_greater is not None else not name.endswith("loss")) else -1
    scored = [(sign * e[key], -s) for s, e in facts.evals.items() if _is_finite(e.get(key))]
    return -max(scored)[1] if scored else None


def _section(
    settings: UploadSettings, facts: RunFacts, repo_id: str, items: Sequence[Item], steps: list[int], *, is_alone: bool
) -> str:
    title = f"# {repo_id.rpartition('/')[2]}" if is_alone else "## Training"
    parts = [title, _origin(facts), "### Use", _usage(repo_id, items)]
    step, metrics = _results(facts, items)
    if metrics:
        rows = "\n".join(f"| {k} | {v:.6g} |" for k, v in metrics.items())
        parts += [f"### Evaluation\n\nMeasured at step {step}.\n\n| metric | value |\n|---|---|\n{rows}"]
    if facts.train_points or facts.evals:
        parts += [f"![Loss by step]({CURVE})"]
    parts += _checkpoints(settings, facts, repo_id, items, steps)
    rows = "\n".join(f"| `{key}` | {value} |" for key in _SETTINGS if (value := facts.get(key)) is not None)
    if rows:
        parts += [f"### Settings\n\n| key | value |\n|---|---|\n{rows}"]
    parts += [f"### Versions\n\n{_versions()}"]
    return "\n\n".join(parts)


def _origin(facts: RunFacts) -> str:
    base = facts.get("model.model_name_or_path")
    if metadata.is_hub_id(base) and not is_local_path(base):
        origin = f"Fine-tuned from [{base}](https://huggingface.co/{base})"
    else:
        origin = "Fine-tuned from a local model" if base else "Trained from scratch"
    datasets = ", ".join(f"[{n}](https://huggingface.co/datasets/{n})" for n in _datasets(facts))
    return origin + (f" on {datasets}." if datasets else ".")


def _usage(repo_id: str, items: Sequence[Item]) -> str:
    prompt = '[{"role": "user", "content": "Hello!"}]' if _has_chat_template(items) else '"Once upon a time"'
    if _is_adapter(items):
        load = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, pipeline\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
            'generate = pipeline("text-generation", model=model, tokenizer=tokenizer)'
        )
    else:
        load = f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="{repo_id}")'
    return f'```python\n{load}\nprint(generate({prompt}, max_new_tokens=100)[0]["generated_text"])\n```'


def _has_chat_template(items: Sequence[Item]) -> bool:
    for item in items:
        if any(f.path == "chat_template.jinja" for f in item.files):
            return True
        try:
            if json.loads((item.root / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def _checkpoints(
    settings: UploadSettings, facts: RunFacts, repo_id: str, items: Sequence[Item], steps: list[int]
) -> list[str]:
    """The table that says which step is what."""
    rows, best = [], best_step(items) or _best_by_metric(facts)
    if settings.strategy == "all_checkpoints":
        rows = [(s, f"`checkpoint-{s}/`, tag `step-{s}`") for s in steps]
    if settings.strategy == "checkpoint":
        rows = [(s, "`last-checkpoint/`") for s in steps]
    if not rows:
        return []
    lines = ["### Checkpoints", "", "| step | epoch | eval_loss | where | |", "|---|---|---|---|---|"]
    for step, where in rows:
        values = facts.evals.get(step, {})
        epoch, loss = (f"{v:.4g}" if _is_finite(v := values.get(k)) else "" for k in ("epoch", "eval_loss"))
        lines.append(f"| {step} | {epoch} | {loss} | {where} | {'best' if step == best else ''} |")
    lines += ["", f"To continue the training: `checkpoint.resume_from_checkpoint=hf://{repo_id}`"]
    return ["\n".join(lines)]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
