"""Python's garbage collector stands aside while libraries are imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """For importing torch and transformers, which makes a million objects that stay: the collector looks through all of
    them again and again, a quarter of the time of a start, and after it in the midst of training. What is there at the
    end is never looked at again, so nothing that may be garbage later belongs inside."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
