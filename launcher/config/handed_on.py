"""Settings that `launcher train` has composed, for the ranks that it starts. Without Hydra, which would cost each of
them a third of a second.

`accelerate launch -m launcher.train` typed by hand composes by itself; so does a rank whose arguments are not those
that the settings in its environment were composed from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import MutableMapping, Sequence

from launcher.base.errors import ConfigError
from launcher.config.parse import parse_config
from launcher.config.settings import RunConfig, to_dict

COMPOSED = "LAUNCHER_COMPOSED"
"""Environment: JSON {"arguments": [...], "settings": {...}}."""
_MAX_BYTES = 100_000
"""Linux takes no variable of more than 128 KiB."""


def hand_on(config: RunConfig, arguments: Sequence[str], env: MutableMapping[str, str] = os.environ) -> None:
    """Puts composed settings into the environment, where that keeps them as they are."""
    env.pop(COMPOSED, None)
    with contextlib.suppress(TypeError, ValueError, ConfigError):  # what JSON cannot hold is composed anew
        text = json.dumps({"arguments": list(arguments), "settings": to_dict(config)})
        if len(text) <= _MAX_BYTES and parse_config(json.loads(text)["settings"]) == config:
            env[COMPOSED] = text


def take_over(arguments: Sequence[str], env: MutableMapping[str, str] = os.environ) -> RunConfig | None:
    """The settings of the process that started this one, if it composed them from these arguments. The environment
    loses them: programs that the user's code starts are not to find them."""
    text = env.pop(COMPOSED, "null")
    with contextlib.suppress(TypeError, ValueError, KeyError, ConfigError):  # nobody's but ours counts
        handed = json.loads(text)
        if handed["arguments"] == list(arguments):
            return parse_config(handed["settings"])
    return None
