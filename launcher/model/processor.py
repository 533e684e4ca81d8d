"""What a model that also takes images or sound is served with, beside its tokenizer: its base's files, unchanged."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from launcher.config.settings import RunConfig, expanded

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def takes_more_than_text(model_config: Any) -> bool:
    """Whether a config of transformers has other parts; that of the text alone (Qwen3.5's) has none."""
    return any(getattr(model_config, part, None) is not None for part in {*model_config.sub_configs} - {"text_config"})


def processor_files(config: RunConfig, model_config: Any, resumed_from: Path | None) -> dict[str, bytes]:
    """Those that there are, of the checkpoint that a run continues, else of the model that it began with."""
    settings = config.model
    if settings.is_adapter or not takes_more_than_text(model_config):  # an adapter is served with its base
        return {}
    if resumed_from is not None and any((resumed_from / name).is_file() for name in FILES):
        source, revision = str(resumed_from), None
    elif settings.model_name_or_path:
        source, revision = expanded(settings.model_name_or_path), settings.revision
    else:
        return {}
    from transformers.utils.hub import cached_file

    found = {}
    for name in FILES:
        with contextlib.suppress(OSError, ValueError):  # not there
            if path := cached_file(source, name, revision=revision):
                found[name] = Path(path).read_bytes()
    return found
