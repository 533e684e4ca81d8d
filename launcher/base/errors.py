"""Every exception class of the product, one per situation.

Messages say what is wrong, the value got, what is valid, and the override that mends it.
`exit_code` is what a `launcher` command ends with: 2 the user's input is wrong, 1 it failed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75


class LauncherError(Exception):
    """Something failed; shown without a traceback."""

    exit_code = EXIT_FAILED


class OutputError(LauncherError):
    """Standard output cannot be written."""


class UserError(LauncherError):
    """The user's input is wrong."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """One or more settings are wrong; all of them are reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Rows or files of the data set cannot be used; names file and line."""


class StopAskedError(LauncherError):
    """Somebody asked to stop while something long was at work; the message is the reason."""

    exit_code = EXIT_STOPPED


class RunLockedError(UserError):
    """Another live run holds this output_dir; names its host and pid."""


class RunLockLostError(LauncherError):
    """This run stood still for so long that another one took its output_dir over; it must not write there."""


class ResumeMismatchError(UserError):
    """The settings differ from the checkpoint's in ways that change the result."""


class ResumeError(UserError):
    """There is nothing to resume from where the user pointed."""


class DamagedCheckpointError(LauncherError):
    """A checkpoint is not what its manifest says; names the file and what is wrong with it."""


class NoWholeCheckpointError(DamagedCheckpointError):
    """Only damaged checkpoints are left in output_dir; `notices` says what became of each."""

    def __init__(self, message: str, notices: Sequence[str] = ()) -> None:
        self.notices = list(notices)
        super().__init__(message)


class UnsafeFileError(UserError):
    """A file is a link or no regular file where only one of this very folder may be read; names it."""


class CheckpointWriteError(LauncherError):
    """A save failed and `checkpoint.on_error=stop`; nothing of it was committed."""


class NonFiniteError(LauncherError):
    """Loss or gradient norm is NaN or infinite and `train.on_nonfinite=stop`."""


class SpikeError(LauncherError):
    """The loss spiked more often than `train.max_spikes` allows."""


class RankFailedError(LauncherError):
    """A process of the run died; names the rank, its host and its own error."""


class MachinesError(LauncherError):
    """The machines of a run did not meet, or one of them has gone."""


class StoppedEarlyError(LauncherError):
    """Somebody asked for a stop before any process was started."""

    exit_code = EXIT_STOPPED


class HubError(LauncherError):
    """The Hub refused for good (token, quota, name); says the cure."""


def not_allowed(path: object) -> str:
    """What to tell of a place that belongs to somebody else."""
    return (
        f"{path} may not be used by this user (uid {os.getuid()}). Have its owner allow it (chmod, chgrp), "
        "or name another one"
    )


class SlurmError(UserError):
    """Slurm refused a job as it was asked for; shows Slurm's own answer."""


class SlurmUnavailableError(LauncherError):
    """Slurm is not installed here or does not answer; shows its own words."""
