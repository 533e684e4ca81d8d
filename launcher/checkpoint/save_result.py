"""What became of a save."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.base.errors import CheckpointWriteError


@dataclass
class SaveResult:
    """Seconds the loop stood still, seconds until durable, bytes; `error` where it failed,
    `found_no_room` where it was not even begun."""

    step: int
    stall_s: float
    write_s: float = 0.0
    num_bytes: int = 0
    error: str | None = None
    found_no_room: bool = False


def raise_failed(result: SaveResult, kept: str) -> None:
    """Raises: CheckpointWriteError, for `checkpoint.on_error=stop`."""
    raise CheckpointWriteError(
        f"the save of step {result.step} failed: {result.error}. Nothing of it was committed; {kept}. To go on without "
        "stopping: checkpoint.on_error=warn"
    )
