"""From a config to the text of a batch script. Nothing here writes, and nothing asks Slurm.

jinja2 rather than string.Template: bash is full of `$`, which string.Template would want doubled everywhere, and the
three templates share one body by `{% include %}`. A name that a template needs and nobody gives is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.base.errors import ConfigError
from launcher.base.paths import slurm_templates_dir
from launcher.config.sbatch import asks_for_gpus
from launcher.config.settings import RunConfig

_BACKSTOP_S = 60
"""So many seconds before the time limit, or up to 60 earlier, the batch shell gets SIGUSR1. It obeys where the ranks do
not know the job's end; those that do stop by themselves, later than the signal mostly comes."""
_WAIT_S = 120
_OPTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
_OURS = {
    "nodes": "launch.num_machines",
    "ntasks": "launch.num_machines (one task on each node starts the processes)",
    "ntasks_per_node": "launch.num_processes (one task on each node starts them)",
    "array": "hydra/launcher=slurm and sweep.num_slots",
    "chdir": "the folder in which you call launcher submit",
    "gpus_per_node": "launch.gpus_per_node",
}


def with_slurm_defaults(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config that the ranks get: output_dir absolute, and the number of processes that the GPUs of the nodes give.

    Raises:
        ConfigError: settings of launch that contradict each other, all of them.
    """
    launch = config.launch
    problems = [*_sbatch_problems(launch.sbatch), *_env_problems(launch.env), *_text_problems(config, run_dir)]
    total, per_node = launch.num_processes, launch.gpus_per_node
    own_gpus = [f"launch.sbatch.{key}={value}" for key, value in launch.sbatch.items() if asks_for_gpus(key, value)]
    if own_gpus and total is None and not per_node:
        problems.append(
            f"{own_gpus[0]} asks for GPUs, but the number of processes follows from launch.gpus_per_node. Set that "
            "instead, or launch.num_processes=N (over all nodes) beside it"
        )
    if total is None:
        total = 1 if config.strategy.name == "single" else launch.num_machines * (per_node or 1)
    elif per_node and total > per_node * launch.num_machines:
        problems.append(
            f"launch.num_processes={total} is more than launch.num_machines={launch.num_machines} nodes have with "
            f"launch.gpus_per_node={per_node}. Set launch.gpus_per_node={-(-total // launch.num_machines)}, "
            f"or leave launch.num_processes=null"
        )
    if total % launch.num_machines:
        problems.append(
            f"launch.num_machines={launch.num_machines} nodes but {total} processes in all "
            f"(strategy={config.strategy.name}). Set launch.num_processes to a multiple of launch.num_machines, "
            "or launch.num_machines=1"
        )
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(
        config, output_dir=str(run_dir), launch=dataclasses.replace(launch, name="slurm", num_processes=total)
    )


def _sbatch_problems(sbatch: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in sbatch.items():
        if owner := _OURS.get(key.replace("-", "_")):
            problems.append(f"launch.sbatch.{key}={value} is set by {owner}. Leave launch.sbatch.{key} out")
        if not _OPTION_NAME.fullmatch(key):
            problems.append(f"launch.sbatch.{key!r} is no name of an option (letters, digits, - and _)")
        elif not _is_one_line(_option_text(value)):
            problems.append(f"launch.sbatch.{key} must be one line of printable text (got {value!r})")
    return problems


def _env_problems(env: Mapping[str, str]) -> list[str]:
    wrong = [name for name in env if not (name.isidentifier() and name.isascii())]
    problems = [f"launch.env.{name} is no name of an environment variable (letters, digits and _)" for name in wrong]
    problems += [
        f"launch.env.{name} would change a variable of the batch script's own. Choose another name, in capitals"
        for name in sorted(set(env) & _own_variables())
    ]
    return problems + [
        f"launch.env.{name} must be text without zero bytes that UTF-8 can hold (got {value!r})"
        for name, value in env.items()
        if not _is_text(value)
    ]


def _own_variables() -> set[str]:
    """Names that the scripts assign to."""
    texts = [path.read_text(encoding="utf-8") for path in slurm_templates_dir().glob("*.s*")]
    return {name for text in texts for name in re.findall(r"(?<![\w$./-])([a-z_]+)\+?=(?!=)", text)}


def _text_problems(config: RunConfig, run_dir: Path) -> list[str]:
    """Values that the script could not hold on one line: an `#SBATCH` line ends with its line, whatever is quoted."""
    launch = config.launch
    texts = {
        "output_dir": str(run_dir), "run_name": config.run_name, "launch.container": launch.container,
        "launch.main_process_ip": launch.main_process_ip, "the working directory": str(Path.cwd()),
        "the path of this Python": sys.executable,
    }  # fmt: skip
    problems = [
        f"{key} must be one line of printable text (got {text!r})"
        for key, text in texts.items()
        if text and not _is_one_line(text)
    ]
    return [*problems, *_setup_problems(launch.setup), *_mount_problems(config)]


def _is_one_line(text: str) -> bool:
    """No control characters, no other line breaks of Unicode, and text that UTF-8 can hold."""
    return _is_text(text) and not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _setup_problems(setup: Sequence[str]) -> list[str]:
    """What bash says to the lines, before a job has waited for its start only to end at once."""
    if bad := [line for line in setup if not _is_text(line) or "\r" in line]:
        return [
            f"launch.setup holds what no bash script can: a zero byte, \\r, or text that is not Unicode (got {bad!r})"
        ]
    if not setup or shutil.which("bash") is None:
        return []
    text = "\n".join(setup) + "\n"
    read = subprocess.run(("bash", "-n"), input=text, capture_output=True, text=True, encoding="utf-8", check=False)
    said = (read.stderr.strip().splitlines() or [""])[0].removeprefix("bash: ")  # a here-document without end: code 0
    if read.returncode == 0 and not said and _ends_in_backslash(text):
        said = "the last line ends in a backslash and would swallow the next one"
    if not said:
        return []
    return [f"launch.setup cannot be read by bash: {said} (got {list(setup)!r}). Each line is one of a bash script"]


def _ends_in_backslash(text: str) -> bool:
    line = text.rstrip("\n")
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _mount_problems(config: RunConfig) -> list[str]:
    """pyxis separates mounts by commas and their parts by colons, with no way to quote either."""
    if not config.launch.container:
        return []
    folders = {"output_dir": config.output_dir, "the working directory": str(Path.cwd())}
    return [
        f"{key}={folder} cannot be mounted into launch.container={config.launch.container}: it holds a colon or a "
        "comma. Choose another folder, or launch.container=null"
        for key, folder in folders.items()
        if set(folder) & {":", ","}
    ]


def sbatch_lines(config: RunConfig, log: str, array: str | None = None) -> list[str]:
    """The `#SBATCH` options: ours first, then the user's, which win over ours of the same name.

    Args:
        log: sbatch's pattern for the log file.
        array: the value of --array.
    """
    launch = config.launch
    ours: dict[str, Any] = {
        "job-name": config.run_name,
        "nodes": launch.num_machines,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.gpus_per_node or None,
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{_BACKSTOP_S}",
        "requeue": launch.max_requeues > 0,
        "chdir": str(Path.cwd()),
        "array": array,
    }
    options = ours | {key.replace("_", "-"): value for key, value in launch.sbatch.items()}
    return [line for name, value in options.items() if (line := _option(name, value))]


def _option(name: str, value: Any) -> str | None:
    if name == "requeue":
        return "--requeue" if value else "--no-requeue"
    if value is None or value is False:
        return None
    if value is True:
        return f"--{name}"
    text = _option_text(value)
    if not (_OPTION_NAME.fullmatch(name) and _is_one_line(text)):
        raise ConfigError([f"launch.sbatch.{name!r} must be one line of printable text (got {text!r})"])
    plain = text and not any(c.isspace() or c in "\"'\\#" for c in text)
    return f"--{name}={text}" if plain else f'--{name}="' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _option_text(value: Any) -> str:
    """As it stands in the script."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def shell_word(value: object) -> str:
    """One word of bash, on one line: sbatch reads lines that begin with #PBS or #BSUB wherever they stand."""
    text = str(value)
    if not any(c < " " or c == "\x7f" for c in text):
        return shlex.quote(text)
    escaped = "".join(_ESCAPES.get(c) or (f"\\{ord(c):03o}" if c < " " or c == "\x7f" else c) for c in text)
    return f"$'{escaped}'"


def render(
    template: str, config: RunConfig, *, run_dirs: Sequence[Path], code_dir: Path, script: Path, log: str,
    array: str | None = None,
) -> str:  # fmt: skip
    """The script of one job, or of one array whose task N runs in `run_dirs[N]`."""
    import jinja2

    loader = jinja2.FileSystemLoader(slurm_templates_dir())
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, comment_start_string="{##", comment_end_string="##}",  # `{#` is bash's ${#name}
    )  # fmt: skip
    environment.filters["sh"] = shell_word
    launch = config.launch
    return environment.get_template(template).render(
        sbatch_lines=sbatch_lines(config, log, array),
        srun_options=_srun_options(config, script.parent.parent),
        run_dirs=run_dirs,
        code_dir=code_dir,
        script=script,
        launch=launch,
        bin_dir=None if launch.container else Path(sys.executable).parent,
    )


def _srun_options(config: RunConfig, root: Path) -> list[str]:
    """An agent ends with an error only where another one has gone: then srun need not wait for a node that is dead.

    `wait`: seconds from the end of the first agent to that of the last, which may have checkpoints to send.
    """
    wait_s = _WAIT_S + (math.ceil(config.hub.max_wait_s) if config.hub.push_to_hub else 0)
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", f"--wait={wait_s}", "--export=ALL", "--cpu-bind=none"]
    return [*options, *(["--label"] if config.launch.num_machines > 1 else []), *_container_options(config, root)]


def _container_options(config: RunConfig, root: Path) -> list[str]:
    """pyxis' options of srun. The container sees the run's folder and the working directory under their own paths."""
    if not config.launch.container:
        return []
    mounts = ",".join(dict.fromkeys(f"{folder}:{folder}" for folder in (root, Path.cwd())))
    return [
        f"--container-image={config.launch.container}", f"--container-mounts={mounts}",
        f"--container-workdir={Path.cwd()}",
    ]  # fmt: skip
