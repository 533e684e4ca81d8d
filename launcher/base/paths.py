"""Every file of a run, as a property of one class."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import UserError, not_allowed

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_CODE_DIR = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The packaged conf/: beside the package in a checkout, inside it in a wheel."""
    return _packaged("conf")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/launcher`, else ~/.cache/launcher.

    Raises:
        UserError: there is no home folder, as in a container for a user that it does not know.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "launcher"
    except RuntimeError:
        raise UserError(
            f"tokenised data has no place: HOME is not set, and user {os.getuid()} has no home folder. Set "
            "data.cache_dir=FOLDER, or HOME"
        ) from None


def constraints_path() -> Path:
    """The versions that this release is tested with: constraints.txt, beside the package or inside it in a wheel."""
    inside = _CODE_DIR / "constraints.txt"
    return inside if inside.is_file() else _CODE_DIR.parent / "constraints.txt"


def slurm_templates_dir() -> Path:
    """The packaged slurm/ templates."""
    return _packaged("slurm_templates", checkout_name="slurm")


def _packaged(name: str, checkout_name: str | None = None) -> Path:
    inside = _CODE_DIR / name
    return inside if inside.is_dir() else _CODE_DIR.parent / (checkout_name or name)


def checkpoint_step(path: Path) -> int | None:
    """The N of a folder named exactly `checkpoint-N`, else None."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else None


def is_own_checkpoint(folder: Path) -> bool:
    """Whether it carries our manifest. Raises: OSError: that cannot be seen."""
    try:
        return stat.S_ISREG(CheckpointPaths(folder).manifest.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


@dataclass(frozen=True)
class CheckpointPaths:
    """The files inside one `checkpoint-N` folder."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def trainer_state(self) -> Path:
        return self.root / "trainer_state.json"

    @property
    def state_dir(self) -> Path:
        return self.root / "state"

    @property
    def run_state(self) -> Path:
        """Progress, scheduler, RNG, data position, settings fingerprint: JSON."""
        return self.state_dir / "state.json"


@dataclass(frozen=True)
class RunPaths:
    """The files inside one `output_dir`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def run_state(self) -> Path:
        return self.root / "run.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def sweep_table(self) -> Path:
        """That of the sweep which this run is a job of, if it is one."""
        return self.root.parent / "sweep.json"

    @property
    def stop_file(self) -> Path:
        return self.root / "STOP"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    @property
    def hub_dir(self) -> Path:
        """The Hub spool: journal and hard links of what is not uploaded yet."""
        return self.root / ".hub"

    @property
    def fetched(self) -> Path:
        """JSON: the `uri` of the checkpoint on the Hub that this run began with."""
        return self.hub_dir / "fetched.json"

    @property
    def code_dir(self) -> Path:
        return self.root / "code"

    @property
    def imported_dir(self) -> Path:
        """Checkpoints made from another tool's, where their own name in output_dir is taken."""
        return self.root / "imported"

    @property
    def evaluations_dir(self) -> Path:
        """What evaluations in the background found, see `base.evaluations`."""
        return self.root / "evaluations"

    def evaluation(self, step: int) -> Path:
        return self.evaluations_dir / f"checkpoint-{step}.json"

    @property
    def evaluation_log(self) -> Path:
        """What the process prints that evaluates in the background."""
        return self.logs_dir / "evaluation.log"

    @property
    def evaluation_stacks(self) -> Path:
        """Where it stood when it hung."""
        return self.logs_dir / "stacks-evaluation.txt"

    @property
    def own_dirs(self) -> tuple[Path, ...]:
        """The folders that a run makes for itself; as links they would lead its writes out of output_dir."""
        return (self.logs_dir, self.hub_dir, self.code_dir, self.slurm_dir, self.imported_dir, self.evaluations_dir)

    @property
    def _own_files(self) -> tuple[Path, ...]:
        return (self.config, self.metrics, self.run_state, self.timeline, self.samples)

    def refuse_links(self) -> None:
        """To be asked before anything is written here.

        Raises:
            UserError: one of `own_dirs` is a link, or something else stands where a run has a folder or a file; or it
                is another user's run, whose logs and settings are private.
        """
        try:
            self._refuse_odd()
        except PermissionError as error:
            raise UserError(
                f"output_dir={self.root}: {not_allowed(error.filename)}. To go on from another user's run in a folder "
                f"of your own: output_dir=FOLDER checkpoint.resume_from_checkpoint={self.root}/checkpoint-N"
            ) from error

    def _refuse_odd(self) -> None:
        for folder in filter(Path.is_symlink, self.own_dirs):
            raise UserError(
                f"{folder} is a link to {folder.readlink()}: what a run writes stays inside of its output_dir. "
                "Remove the link, or set another output_dir=… (which may itself be a link)"
            )
        folders = (self.logs_dir, self.evaluations_dir)
        odd = [(path, "a folder") for path in folders if path.exists() and not path.is_dir()]
        odd += [(path, "a file") for path in self._own_files if path.is_dir() and not path.is_symlink()]
        for path, wanted in odd:
            raise UserError(
                f"{path} is there, and a run has {wanted} of that name. Move it away, or set another output_dir=…"
            )

    @property
    def slurm_dir(self) -> Path:
        return self.root / "slurm"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def checkpoint_dir(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def temporary_dir(self, step: int) -> Path:
        return self.root / f".tmp-checkpoint-{step}"

    @property
    def timeline(self) -> Path:
        """What the time was spent on, see `base.timeline`."""
        return self.logs_dir / "timeline.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote in each evaluation by generation: step, prompt, answer, expected."""
        return self.logs_dir / "samples.jsonl"

    def rank_log(self, rank: int) -> Path:
        return self.logs_dir / f"rank-{rank}.log"

    def agent_log(self, machine_rank: int = 0) -> Path:
        """What `accelerate launch` and the libraries print on one machine."""
        return self.logs_dir / (f"agent-{machine_rank}.log" if machine_rank else "agent.log")

    def stacks(self, rank: int) -> Path:
        """Python stacks of every thread, written when a hang is detected."""
        return self.logs_dir / f"stacks-rank-{rank}.txt"

    def checkpoint_dirs(self) -> Iterator[tuple[int, Path]]:
        """(step, folder) of all folders named exactly `checkpoint-N`, by rising step; links to folders among them."""
        if not self.root.is_dir():
            return
        found = [(step, p) for p in self.root.iterdir() if (step := checkpoint_step(p)) is not None and p.is_dir()]
        yield from sorted(found)

    def own_checkpoints(self) -> dict[int, Path]:
        """Step → folder of those that carry our manifest, in the same order. Others are not touched.

        Raises:
            OSError: one may not be entered; that says nothing of what is in it.
        """
        return {step: folder for step, folder in self.checkpoint_dirs() if is_own_checkpoint(folder)}
