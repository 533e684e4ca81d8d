"""Output that cannot be written never ends a run: a closed terminal, `… | head -1`. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from launcher.base.errors import OutputError


class SurvivingStream:
    """A text stream whose writes cannot fail: where nobody reads any more, what follows goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Points the descriptor at nothing; what is in the buffer is lost. A full disk may have room again."""
        if isinstance(error, BrokenPipeError | ValueError) or getattr(error, "errno", None) == 5:  # EIO: no terminal
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class TellingStream:
    """A text stream whose output is all that somebody asked for: what cannot be written is an error with a name.

    Raises:
        OutputError: from `write` and `flush`. BrokenPipeError: as it is, nobody reads any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with self._named():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"the output cannot be written: {error.strerror or error}. Make room there, or send it elsewhere"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def tell_failed_output() -> None:
    """Has a failing write to stdout told in one line; until `survive_closed_output`."""
    sys.stdout = cast(TextIO, TellingStream(sys.stdout))


def open_standard_files() -> None:
    """Opens what was closed of the descriptors 0 to 2 (`>&-`): else the next file that is opened would be the output.

    To be called before anything else is opened.
    """
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
        os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, encoding="utf-8", errors="backslashreplace", closefd=False))


def survive_closed_output() -> None:
    """Makes this process's own prints survive; a second call changes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream = stream.stream if isinstance(stream, TellingStream) else stream
        if stream is not None and not isinstance(stream, SurvivingStream):
            setattr(sys, name, cast(TextIO, SurvivingStream(stream)))
