"""The command `launcher`: verbs, and the one place where an error becomes a message and an exit code.

A verb is a module here with `main(argv) -> int`; it is imported only when it is asked for. Imports no torch, and little
else: until `main` begins, a signal kills.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence

from launcher import __version__
from launcher.base.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USER,
    ConfigError,
    LauncherError,
    OutputError,
    UserError,
    not_allowed,
)
from launcher.base.first_moments import obey_signals
from launcher.base.output import open_standard_files, tell_failed_output

VERBS = {
    "train": "train, or go on where the run was stopped; -m: a sweep",
    "submit": "the same as a Slurm job that requeues itself",
    "checkpoints": "what a run has saved",
    "verify": "re-read every byte of a checkpoint against its manifest",
    "export": "a checkpoint for serving, or for transformers' Trainer",
    "plan": "memory per device, what fits, disk per checkpoint, before anything is loaded",
    "preview": "rows as they are trained on, and what bears loss",
    "prefetch": "download model and data before a run without internet",
    "push": "send checkpoints to the Hugging Face Hub",
    "status": "what runs, where it is, how fast",
    "report": "a run or a sweep as one HTML page with plots",
    "doctor": "the machine, versions, devices, and the command that mends what is wrong",
    "init": "a small project of your own in a new folder",
    "completion": "what the Tab key completes in bash, zsh or fish",
}

_USAGE = "usage: launcher VERB [ARGUMENT…]"


_ESCAPE_OR_REPLACE = "launcher.escape_or_replace"
_ERRORS = {"strict": "replace", "surrogateescape": _ESCAPE_OR_REPLACE}
"""What becomes of a character that a stream's encoding lacks. The locale C has names of files pass as the bytes they
are, and would refuse every other character."""


def _escape_or_replace(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError as lacking:
        return "?" * (lacking.end - lacking.start), lacking.end


codecs.register_error(_ESCAPE_OR_REPLACE, _escape_or_replace)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        0 done, 2 the user's input is wrong, 1 it failed, 75 it was stopped on request and saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        open_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe that knows ASCII alone gets ? for the rest
            stream.reconfigure(errors=_ERRORS.get(stream.errors or "strict", stream.errors))
    if argv is None:
        tell_failed_output()
    if argv is None and arguments[:1] == ["train"]:
        obey_signals()
    try:
        return _run(arguments)
    except LauncherError as error:
        if isinstance(error, OutputError):
            _give_up_output()
        with _telling():
            _show(error)
        return error.exit_code
    except KeyboardInterrupt:
        with _telling():
            print("launcher: interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `launcher status | head`
        _give_up_output()
        return EXIT_FAILED
    except Exception as error:
        place = error.filename if isinstance(error, PermissionError) else None
        with _telling():
            if place is None:
                print(f"launcher: {_unexpected(error)}", file=sys.stderr)
            else:
                _show(UserError(not_allowed(place)))
        return EXIT_FAILED if place is None else EXIT_USER


def _run(arguments: list[str]) -> int:
    _check_working_directory()
    try:
        code = _dispatch(arguments)
    except SystemExit:  # argparse, after a help text
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """What cannot be shown does not change the exit code: the interpreter flushes stderr at exit, and where that fails
    it exits with 120."""
    try:
        yield
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def _give_up_output() -> None:
    """The interpreter flushes it at exit."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def _check_working_directory() -> None:
    """Raises: UserError: it has been deleted."""
    try:
        os.getcwd()  # noqa: PTH109 - no need for pathlib yet
    except OSError as error:
        raise UserError(f"the working directory is gone ({error.strerror}): cd to one that is there") from None


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb == "help" and arguments[1:2] and arguments[1] in VERBS:
        verb, arguments = arguments[1], [arguments[1], "--help"]
    if verb in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE
    if verb in ("-V", "--version"):
        print(f"launcher {__version__}")
        return EXIT_DONE
    if verb not in VERBS:
        from launcher.config.schema import did_you_mean

        meant = f" Did you mean launcher train {verb}?" if "=" in verb else did_you_mean(verb, [*VERBS, "--version"])
        raise UserError(f"{verb} is not a verb.{meant} Valid: {', '.join(VERBS)}")
    code: int = importlib.import_module(f"launcher.cli.{verb}").main(arguments[1:])
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"""{_USAGE}

Fine-tune language models on many GPUs and never lose a run.

{verbs}

Each has its own help: launcher train --help
example: launcher train data.train_files=chat.jsonl model.model_name_or_path=Qwen/Qwen2.5-0.5B"""


def _show(error: LauncherError) -> None:
    """The message on stderr: in colour in a terminal, plain where it is read by a program."""
    from launcher.base.secrets import redacted

    if isinstance(error, ConfigError) and len(error.problems) > 1:
        heading = f"{len(error.problems)} settings are wrong:"
        lines = [f"  - {redacted(problem)}" for problem in error.problems]
    else:
        heading, lines = redacted(str(error)), []
    if not sys.stderr.isatty():
        print(f"launcher: {heading}", *lines, sep="\n", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("launcher: ", "bold red"), heading))
    for line in lines:
        console.print(Text(line))


def _unexpected(error: Exception) -> str:
    """An error of ours rather than the user's: a short message, and where the rest of it is."""
    import tempfile
    import traceback

    from launcher.base.secrets import redacted

    text = redacted("".join(traceback.format_exception(error)))
    if os.environ.get("LAUNCHER_DEBUG"):
        return text
    try:  # a new file, readable by its owner alone: the folder is everybody's
        fd, where = tempfile.mkstemp(prefix=f"launcher-error-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as failed:
        return f"{text}\n(this could not be written to a temporary file: {failed})"
    message = redacted(str(error)).partition("\n")[0]
    return f"unexpected {type(error).__name__}: {message}\nThe traceback is in {where}; LAUNCHER_DEBUG=1 shows it here"
