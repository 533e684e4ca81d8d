"""Random streams: derived from (seed, rank, step) at every step, and stored as plain data.

Deriving makes a resume exact on any number of processes: nothing that happened between two steps (an evaluation, a
restart) can shift a later step's dropout. The stored states are for whoever inspects or continues elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_step(seed: int, rank: int, step: int) -> None:
    """Sets every generator to the stream of this optimizer step on this process."""
    digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    value = int.from_bytes(digest[:8], "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(value % 2**63)
    else:  # the seeds of devices that there are not are put off, each with a stack trace: half a millisecond
        torch.default_generator.manual_seed(value % 2**63)


def capture() -> dict[str, Any]:
    """The generators' states as JSON values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def restore(state: dict[str, Any]) -> None:
    """Puts captured states back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["cuda"])), dtype=torch.uint8))
