"""`launcher prefetch`: downloads model and data where there is internet, for runs without. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.paths import RunPaths
from launcher.config.compose import compose_arguments
from launcher.config.settings import RunConfig, is_local_path
from launcher.hub import fetch_checkpoint, fetch_model
from launcher.hub.environment import distrust_xet

_EXAMPLE = """example:
  launcher prefetch model.model_name_or_path=ORG/MODEL data.dataset_name=ORG/DATA

Takes the same overrides as `launcher train`. Afterwards the run needs no network: HF_HUB_OFFLINE=1 launcher train …"""


def main(argv: list[str]) -> int:
    """Downloads everything that a config names on the Hub; returns the exit code.

    Raises:
        ConfigError: the overrides are wrong. UserError: something is not there or may not be read.
    """
    parser = argparse.ArgumentParser(
        prog="launcher prefetch", description="Download model and data beforehand.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="KEY=VALUE, as for launcher train")
    options, rest = parser.parse_known_args(argv)
    distrust_xet()
    config = compose_arguments(_with_own_base([*options.overrides, *rest]))
    found = False
    with_code = config.model.trust_remote_code
    for what, name, revision in _models(config):
        folder = fetch_model(name, revision, with_weights=what != "tokenizer", with_code=with_code)
        _say(f"{what} {name}", str(folder))
        found = True
    for name, subset, splits in _datasets(config):
        _fetch_dataset(name, subset, splits)
        _say(f"data set {name}", ", ".join(splits))
        found = True
    resume = config.checkpoint.resume_from_checkpoint
    if resume.startswith("hf://"):
        _say(f"checkpoint {resume}", str(fetch_checkpoint(resume, RunPaths(Path(config.output_dir).expanduser()))))
        found = True
    if not found:
        print("nothing to download: this config takes neither a model nor data from the Hub")
    return EXIT_DONE


def _with_own_base(arguments: list[str]) -> list[str]:
    """The same, with the model that an adapter on the Hub belongs to where only the adapter is named."""
    keys = ("model.adapter_name_or_path", "model.model_name_or_path")
    adapter, base = (_value(arguments, key) for key in keys)
    if not adapter or base or is_local_path(adapter):  # a folder's base is named by the rules
        return arguments
    own = files.read_json_or(fetch_model(adapter, None, with_weights=True, with_code=False) / "adapter_config.json", {})
    base = own.get("base_model_name_or_path") if isinstance(own, dict) else None
    if not base:
        return arguments
    overrides = ["model=pretrained", f"model.model_name_or_path={base}"]
    if own.get("revision"):
        overrides.append(f"model.revision={own['revision']}")
    _say(f"adapter {adapter} belongs to {base}; to train it on", " ".join(overrides))
    return [*(a for a in arguments if not a.startswith(("model=", "model.model_name_or_path="))), *overrides]


def _value(arguments: list[str], key: str) -> str | None:
    values = [text.partition("=")[2].strip("'\"") for text in arguments if text.partition("=")[0].lstrip("+") == key]
    return values[-1] if values and values[-1] != "null" else None


def _say(what: str, where: str) -> None:
    print(f"{what}: {where}", flush=True)


def _models(config: RunConfig) -> list[tuple[str, str, str | None]]:
    """("model", "adapter" or "tokenizer", name, revision) of what is on the Hub."""
    model = config.model
    named = [
        ("model", model.model_name_or_path, model.revision),
        ("adapter", model.adapter_name_or_path, None),
        ("tokenizer", model.tokenizer_name_or_path, None),
    ]
    return [(what, name, revision) for what, name, revision in named if name and not is_local_path(name)]


def _datasets(config: RunConfig) -> list[tuple[str, str | None, list[str]]]:
    """(name, configuration, splits) of every data set on the Hub."""
    data = config.data
    named: list[dict[str, Any]] = [vars(data), *data.sources]
    found = []
    for source in named:
        name = source.get("dataset_name")
        if name and not is_local_path(name):
            splits = [str(source.get("train_split") or data.train_split)]
            if isinstance(split := source.get("eval_split"), str):
                splits.append(split)
            found.append((str(name), source.get("dataset_config"), splits))
    return found


def _fetch_dataset(name: str, subset: str | None, splits: list[str]) -> None:
    import datasets

    for split in splits:
        try:
            datasets.load_dataset(name, subset, split=split)
        except Exception as error:  # datasets and its back ends raise two dozen classes
            raise UserError(f"data.dataset_name={name} [{split}] cannot be downloaded: {error}") from error
