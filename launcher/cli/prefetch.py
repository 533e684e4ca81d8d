"""`launcher prefetch`: downloads model and data where there is internet, for runs without. Imports no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.paths import RunPaths
from launcher.cli.arguments import parse_settings
from launcher.cli.train import as_argv
from launcher.config.arguments import Arguments
from launcher.config.compose import compose, compose_arguments, compose_hydra, to_plain
from launcher.config.settings import RunConfig, is_local_path
from launcher.hub import fetch_checkpoint, fetch_model
from launcher.hub.environment import distrust_xet
from launcher.sweep.plan import quoted

_FROM_SCRATCH = ("tiny_llama", "scratch")

_EXAMPLE = """example:
  launcher prefetch model.model_name_or_path=ORG/MODEL data.dataset_name=ORG/DATA

Takes the same overrides as `launcher train`. Afterwards the run needs no network: HF_HUB_OFFLINE=1 launcher train …"""


def main(argv: list[str]) -> int:
    """Downloads everything that a config names on the Hub; returns the exit code.

    Raises:
        ConfigError: the overrides are wrong. UserError: something is not there or may not be read.
    """
    parser = argparse.ArgumentParser(
        prog="launcher prefetch", usage="launcher prefetch [OVERRIDE…]",
        description="Download model and data beforehand.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    _, arguments = parse_settings(parser, argv)
    distrust_xet()
    config = _config(arguments)
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


def _config(arguments: Arguments) -> RunConfig:
    """That of the command line, with the model that an adapter belongs to where only the adapter is named: there, or in
    an experiment or another settings file.

    Raises:
        ConfigError: the overrides are wrong.
    """
    if arguments.config_file is not None:  # of a run, which has named its model
        return compose_arguments(as_argv(arguments))
    composed = compose_hydra(arguments.overrides, arguments.config_dir)
    model, choice = to_plain(composed).get("model"), composed.hydra.runtime.choices.get("model")
    own = _own_base(model if isinstance(model, dict) else {}, is_shipped=choice in _FROM_SCRATCH)
    replaced = {text.partition("=")[0] for text in own}
    kept = [text for text in arguments.overrides if text.partition("=")[0].lstrip("+") not in replaced]
    return compose([*kept, *own], arguments.config_dir)


def _own_base(model: dict[str, Any], *, is_shipped: bool) -> list[str]:
    """Overrides that name the model of an adapter that is alone.

    Args:
        model: the group as it is composed, its values unchecked.
        is_shipped: it is a choice of ours for models from scratch, and no file of the user's that names the adapter.
    """
    adapter = model.get("adapter_name_or_path")
    if not isinstance(adapter, str) or not adapter or model.get("model_name_or_path"):
        return []
    if is_local_path(adapter):
        folder = Path(adapter).expanduser()
    else:
        folder = fetch_model(adapter, None, with_weights=True, with_code=False)
    own = files.read_json_or(folder / "adapter_config.json", {})
    base = own.get("base_model_name_or_path") if isinstance(own, dict) else None
    if not base or not isinstance(base, str):
        return []
    overrides = [f"model.model_name_or_path={_as_value(base)}"]
    if is_shipped or model.get("config"):
        overrides.insert(0, "model=pretrained" if is_shipped else "model.config=null")
    if own.get("revision"):
        overrides.append(f"model.revision={_as_value(str(own['revision']))}")
    _say(f"adapter {adapter} belongs to {base}; to train it on", " ".join(overrides))
    if is_local_path(base):
        _say(f"model {base}", "a folder; nothing to download")
    return overrides


def _as_value(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z][\w./-]*|/[\w./-]+", text) else quoted(text)


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
