"""Whether a config.json may belong to the checkpoint that it lies in. Standard library only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from launcher.base import files

_MIN_MODULE_BYTES = 64
_MAX_LAYERS, _MAX_MODULES = 1000, 100_000
"""Built within minutes, whatever lies beside them. Most architectures hold the experts of a layer as one parameter, and
some name more than they have: Doge's config has num_experts=16384 where it is no mixture."""


def refuse_giant(config: dict[str, Any], folder: Path) -> None:
    """A mistyped or hostile number of layers would keep us building modules for days.

    Raises:
        ValueError: more modules than the files beside it have bytes for.
    """
    counts = {"layer": 1, "expert": 1}
    for values in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key, value in values.items():
            for kind in counts:
                if kind in str(key) and "size" not in str(key) and type(value) is int:
                    counts[kind] = max(counts[kind], value)
    stored = sum((folder / name).lstat().st_size for name in files.list_files(folder))
    has_room = stored // _MIN_MODULE_BYTES
    if counts["layer"] > max(_MAX_LAYERS, has_room) or math.prod(counts.values()) > max(_MAX_MODULES, has_room):
        raise ValueError(f"{counts['layer']} layers with {counts['expert']} experts do not fit into {stored:,} bytes")
