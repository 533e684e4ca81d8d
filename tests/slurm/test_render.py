"""The scripts as text: golden files, quoting, and what is refused before Slurm is asked. No Slurm is needed."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.base.errors import ConfigError
from launcher.base.paths import slurm_templates_dir
from launcher.config.settings import LaunchConfig, RunConfig, StrategyConfig
from launcher.slurm import ArrayJob, render_arrays, render_run
from launcher.slurm.render import with_slurm_defaults

_GOLDEN = Path(__file__).parent.parent / "golden"
_GPU = {"gpus_per_node": 8, "sbatch": {"partition": "gpu", "time": "12:00:00", "exclusive": True}}


def render_golden(name: str) -> str:
    if name == "single_node":
        config = RunConfig(output_dir="/shared/run", run_name="sft", launch=LaunchConfig(**_GPU))
        return render_run(config)
    if name == "multi_node":
        extra = {"setup": ["module load cuda"], "env": {"NCCL_DEBUG": "WARN"}, "container": "/images/torch.sqsh"}
        launch = LaunchConfig(num_machines=2, **_GPU, **extra)
        return render_run(
            RunConfig(output_dir="/shared/run", run_name="sft", launch=launch, strategy=StrategyConfig(name="zero3"))
        )
    jobs = [Path("/shared/sweep") / f"seed={seed}" for seed in (1, 2, 3)]
    array = [ArrayJob(run_dir, RunConfig(output_dir=str(run_dir), launch=LaunchConfig(**_GPU))) for run_dir in jobs]
    (text,) = render_arrays(array, Path("/shared/sweep"), max_parallel=2)
    return text


@pytest.fixture(autouse=True)
def fixed_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")


@pytest.mark.parametrize("name", ["single_node", "multi_node", "array"])
def test_script_is_the_golden_one_when_rendered(name: str, tmp_path: Path) -> None:
    """After a change that is meant: UPDATE_GOLDEN=1 pytest tests/slurm/test_render.py, and read the difference."""
    text = render_golden(name).replace(str(tmp_path), "/home/user")
    if name == "array":
        code = text.split("code_dir=/shared/sweep/code/")[1].split("\n")[0]
        text = text.replace(code, "0123456789ab")
    golden = _GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_every_template_has_a_golden_file() -> None:
    assert {p.name for p in slurm_templates_dir().glob("*.sbatch")} == {p.name for p in _GOLDEN.glob("*.sbatch")}


@pytest.mark.parametrize("name", ["single_node", "multi_node", "array"])
def test_script_is_valid_bash_when_rendered(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=render_golden(name), capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_rendering_writes_nothing(tmp_path: Path) -> None:
    render_run(RunConfig(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def sbatch_options(config: RunConfig) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in render_run(config).splitlines() if line.startswith("#SBATCH")]


def test_sbatch_options_pass_through_under_their_own_names() -> None:
    sbatch = {"cpus-per-task": 4, "mail_type": ["END", "FAIL"], "comment": 'two "words"', "hold": True, "qos": None}
    options = sbatch_options(RunConfig(launch=LaunchConfig(sbatch=sbatch)))
    assert {"--cpus-per-task=4", "--mail-type=END,FAIL", '--comment="two \\"words\\""', "--hold"} <= set(options)
    assert not any("qos" in option for option in options)


def test_users_option_wins_over_ours() -> None:
    options = sbatch_options(RunConfig(launch=LaunchConfig(sbatch={"job_name": "mine", "requeue": False})))
    assert "--job-name=mine" in options and "--no-requeue" in options
    assert sum("job-name" in option for option in options) == 1


def test_job_is_not_requeueable_when_max_requeues_is_0() -> None:
    assert "--no-requeue" in sbatch_options(RunConfig(launch=LaunchConfig(max_requeues=0)))


def test_values_stay_values_when_they_look_like_shell(tmp_path: Path) -> None:
    evil = tmp_path / "a b; touch $HOME 'x' `id`"
    launch = LaunchConfig(env={"WORDS": "it's $PATH; `id`"}, num_machines=2)
    text = render_run(RunConfig(output_dir=str(evil), run_name="a b", launch=launch))
    lines = [line for line in text.splitlines() if line.startswith(("run_dir=", "export WORDS="))]
    script = "\n".join(lines) + '\nprintf "%s\\n" "$run_dir" "$WORDS"'
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == [str(evil), "it's $PATH; `id`"]


def test_percent_of_output_dir_is_no_pattern_of_sbatch() -> None:
    options = sbatch_options(RunConfig(output_dir="/shared/90%a"))
    assert "--output=/shared/90%%a/logs/slurm-%j.log" in options


def test_processes_follow_from_gpus_when_not_set() -> None:
    config = with_slurm_defaults(RunConfig(launch=LaunchConfig(num_machines=2, gpus_per_node=8)), Path("/shared/run"))
    assert config.launch.num_processes == 16


def test_every_contradiction_is_named_when_there_are_several() -> None:
    launch = LaunchConfig(
        num_machines=2, gpus_per_node=2, num_processes=8, sbatch={"nodes": 4, "ntasks-per-node": 8}, env={"A-B": "c"}
    )
    with pytest.raises(ConfigError) as caught:
        render_run(RunConfig(launch=launch))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for words in ("launch.sbatch.nodes=4", "launch.num_machines", "launch.gpus_per_node=4", "launch.env.A-B"):
        assert words in text


def test_two_nodes_are_refused_when_the_strategy_is_for_one_process() -> None:
    with pytest.raises(ConfigError, match=r"launch\.num_machines=1"):
        render_run(RunConfig(launch=LaunchConfig(num_machines=2), strategy=StrategyConfig(name="single")))


def test_jobs_that_ask_for_other_nodes_get_an_array_of_their_own(tmp_path: Path) -> None:
    def job(name: str, **launch: int) -> ArrayJob:
        return ArrayJob(tmp_path / name, RunConfig(run_name=name, launch=LaunchConfig(**launch)))

    texts = render_arrays([job("a"), job("b", num_machines=2), job("c")], tmp_path)
    assert [text.split("#SBATCH --array=")[1].split("\n")[0] for text in texts] == ["0-1", "0-0"]
    assert f"  {tmp_path}/a\n  {tmp_path}/c\n" in texts[0]


# --------------------------------------------------------------------------- nothing breaks out of the script

_NASTY = [
    *"ab01 \t\n\r\v\f\x1b\x7f\0'\"`$\\#;&|<>(){}[]*?!~=,:%@^-é漢\u0085\u2028\udc80", "$(id)", "${HOME}",
    "\n#SBATCH --uid=0",
    "\n#PBS -q evil\n", "\nEOF\n", "{{ 7*7 }}", "{% raw %}", "{#", "--wrap=id", "\\n",
]  # fmt: skip


def nasty(source: random.Random, *, is_line: bool) -> str:
    pieces = [p for p in _NASTY if p.isprintable()] if is_line else [p for p in _NASTY if p not in ("\0", "\udc80")]
    pieces = pieces if source.random() < 0.97 else _NASTY
    return "".join(source.choices(pieces, k=source.randint(0, 8)))


def is_one_line(text: str) -> bool:
    return not any(c < " " or c in "\x7f\x85\u2028\u2029" or "\ud800" <= c <= "\udfff" for c in text)


def as_sbatch_reads(line: str) -> list[str]:
    """The options of an #SBATCH line by sbatch's rules: both quotes group, a backslash escapes everywhere."""
    words: list[str] = []
    word, quote, is_escaped, is_word = "", "", False, False
    for c in line:
        if is_escaped or (quote and c not in (quote, "\\")) or not (c.isspace() or c in "\"'\\#"):
            word, is_escaped, is_word = word + c, False, True
        elif c == "\\":
            is_escaped = True
        elif quote:
            quote = ""
        elif c in "\"'":
            quote, is_word = c, True
        elif c == "#":
            break
        elif is_word:
            words, word, is_word = [*words, word], "", False
    assert not quote
    return [*words, word] if is_word else words


def fuzzed_config(source: random.Random, folder: Path) -> tuple[RunConfig, dict[str, object]]:
    sbatch: dict[str, object] = {
        "comment": nasty(source, is_line=True), "mail-type": [nasty(source, is_line=True), nasty(source, is_line=True)],
        "account": nasty(source, is_line=True),
    }  # fmt: skip
    image = nasty(source, is_line=True).replace(":", "").replace(",", "") or None
    launch = LaunchConfig(
        sbatch=sbatch, env={name: nasty(source, is_line=False) for name in ("FIRST", "SECOND")}, num_machines=2,
        container=image if source.random() < 0.3 else None, main_process_ip=nasty(source, is_line=True) or None,
    )  # fmt: skip
    name = nasty(source, is_line=True).replace("/", "").replace("\0", "")
    output_dir = f"{folder}/o{name.replace(':', '').replace(',', '') if launch.container else name}"
    return RunConfig(output_dir=output_dir, run_name=nasty(source, is_line=True) or "x", launch=launch), sbatch


def test_values_come_through_or_are_refused_when_they_are_nasty(tmp_path: Path) -> None:
    """Seeded. What bash and sbatch read from the script is what the config holds, and nothing else."""
    source, num_rendered = random.Random(7), 0
    for _ in range(250):
        config, sbatch = fuzzed_config(source, tmp_path)
        lines = [config.output_dir, config.run_name, config.launch.container or "", config.launch.main_process_ip or ""]
        lines += [str(sbatch["comment"]), *sbatch["mail-type"], str(sbatch["account"])]  # type: ignore[misc]
        texts = [value for value in config.launch.env.values() if "\0" in value or "\udc80" in value]
        is_valid = all(map(is_one_line, lines)) and not texts
        try:
            text = render_run(config)
        except ConfigError as error:
            assert not is_valid, error.problems
            continue
        assert is_valid
        num_rendered += 1
        wanted = {
            f"--comment={sbatch['comment']}", f"--account={sbatch['account']}", f"--job-name={config.run_name}",
            "--mail-type=" + ",".join(sbatch["mail-type"]),  # type: ignore[call-overload]
            "--output=" + config.output_dir.replace("%", "%%") + "/logs/slurm-%j.log",
        }  # fmt: skip
        options = [
            as_sbatch_reads(line.removeprefix("#SBATCH")) for line in text.split("\n") if line.startswith("#SBATCH")
        ]
        assert all(len(words) == 1 for words in options)
        assert wanted <= {word for (word,) in options}
        assert not [line for line in text.split("\n") if line.startswith(("#PBS", "#BSUB"))]
        assert subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True).stderr == b""
        head = text.partition(
            "# ---------------------------------------------------------------- what runs on the nodes"
        )[0]
        head = "squeue() { :; }; scontrol() { :; }; SLURM_JOB_ID=1\n" + head
        shown = subprocess.run(
            ["bash", "-c", head + '\nprintf "%s\\0" "$run_dir" "$FIRST" "$SECOND" "$main_process_ip"'],
            capture_output=True, check=True, env={"PATH": os.environ["PATH"]},
        ).stdout.decode().split("\0")  # fmt: skip
        expected = [config.output_dir, *config.launch.env.values()]
        assert shown[:3] == expected
        if config.launch.main_process_ip:
            assert shown[3] == config.launch.main_process_ip
    assert num_rendered > 60


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"sbatch": {"mail-type": ["END", "FAIL\n#SBATCH --wrap=id"]}}, "launch.sbatch.mail-type must be one line"),
        ({"sbatch": {"comment\n#SBATCH --wrap": "id"}}, "is no name of an option"),
        ({"sbatch": {"comment": "a\r#SBATCH --wrap=id"}}, "launch.sbatch.comment must be one line"),
        ({"sbatch": {"a b": "c"}}, "is no name of an option"),
        ({"container": "a\x1b[2J"}, "launch.container must be one line"),
        ({"env": {"A": "a\0b"}}, "launch.env.A must be text"),
        ({"env": {"A\nB": "c"}}, "is no name of an environment variable"),
        ({"setup": ["cat <<EOF"]}, "here-document"),
        ({"setup": ["export A=1 \\"]}, "ends in a backslash"),
        ({"setup": ["a\0b"]}, "zero byte"),
    ],
)
def test_script_is_refused_when_a_value_would_break_out_of_it(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        render_run(RunConfig(launch=LaunchConfig(**launch)))


@pytest.mark.parametrize("name", ["a\nb", "a\r", "a\x1b[2J"])
def test_script_is_refused_when_the_working_directory_has_no_name_on_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match="the working directory must be one line"):
        render_run(RunConfig(output_dir="/shared/run"))


# --------------------------------------------------------------------------- what a user mistypes, with --dry-run


def refusal(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What is printed for settings that are wrong; nothing else is."""
    assert cli.main(["submit", "--dry-run", *overrides]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "raceback" not in shown.err
    return shown.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "launch.sbatch.time=lots",
            ["launch.sbatch.time", "'lots'", "DAYS-HOURS", "launch.sbatch.time=\"'12:00:00'\""],
        ),
        ("launch.sbatch.time=12h", ["'12h'", "launch.sbatch.time=\"'12:00:00'\""]),
        ("launch.sbatch.time=", ["''", "launch.sbatch.time=\"'12:00:00'\""]),
        ("launch.sbatch.time-min=soon", ["launch.sbatch.time-min", "'soon'"]),
        ("launch.sbatch.foo.bar=1", ["launch.sbatch.foo", "{'bar': 1}", "one value"]),
        ("launch.gpus_per_node=a100:4", ["'a100:4'", "launch.gpus_per_node=null"]),
        ("launch.num_machines=0", ["at least 1", "launch.num_machines=1"]),
        ("launch.sbatch=gpu", ["launch.sbatch.NAME=VALUE"]),
        ("launch.setup=5", ["launch.setup=["]),
        ("launch.sbatch.nodes=2", ["launch.num_machines", "launch.sbatch.nodes"]),
        ("launch.sbatch.gres=gpu:4", ["launch.sbatch.gres=gpu:4", "launch.gpus_per_node", "launch.num_processes"]),
        ("launch.sbatch.gpus=4", ["launch.sbatch.gpus=4", "launch.gpus_per_node"]),
        ("launch.partition=gpu", ["launch.sbatch.partition=gpu"]),
        ("launch.time=1:00:00", ["launch.sbatch.time=1:00:00"]),
        ("partition=gpu", ["launch.sbatch.partition=gpu"]),
        ("launch.nodes=2", ["launch.num_machines"]),
        ("launch.env.A=null", ["launch.env.A", "None", "text"]),
        ("launch.env.A.B=1", ["launch.env.A", "text"]),
        ("launch.env.A-B=1", ["launch.env.A-B", "letters, digits and _"]),
        ("launch.env.job=1", ["launch.env.job", "batch script's own"]),
        ("launch.env.verdict_file=1", ["launch.env.verdict_file", "batch script's own"]),
        ("launch.main_process_port=99999999", ["launch.main_process_port", "65535"]),
        ("launch.setup=['echo ${HOME}']", ["launch.setup[0]", "$HOME"]),
        ("launch.setup=['if true; then']", ["launch.setup", "syntax error", "if true; then"]),
        ("launch.setup=['echo \"never closed']", ["launch.setup", "line 1"]),
        ("output_dir=", ["output_dir", "empty", "output_dir=outputs/"]),
        ("output_dir='a\nb'", ["output_dir", "one line"]),
        ("launch.sbatch.--qos=low", ["launch.sbatch.--qos", "not a key"]),
        ("launch.sbatch.my part=gpu", ["launch.sbatch.my part", "not a key"]),
    ],
)
def test_mistake_names_key_value_and_mend(override: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = refusal(capsys, "experiment=arithmetic", "launch.num_processes=null", override)
    assert [word for word in words if word not in shown] == [], shown


def test_every_mistake_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = refusal(capsys, "launch.sbatch.time=lots", "launch.env.A=null", "output_dir=", "launch.partition=gpu")
    for word in ("launch.sbatch.time", "launch.env.A", "output_dir is empty", "launch.sbatch.partition=gpu"):
        assert word in shown


@pytest.mark.parametrize("time", ["90", "90:30", "12:00:00", "1-0", "1-12:30", "2-00:00:00", "INFINITE", "unlimited"])
def test_every_time_that_slurm_reads_is_taken(time: str) -> None:
    assert f"--time={time}" in sbatch_options(RunConfig(launch=LaunchConfig(sbatch={"time": time})))
    assert cli.main(["submit", "--dry-run", f"launch.sbatch.time='{time}'"]) == 0


def test_unknown_option_of_sbatch_is_noticed_and_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A newer Slurm may know it."""
    assert cli.main(["submit", "--dry-run", "launch.sbatch.partion=gpu", "launch.sbatch.cpus_per_task=4"]) == 0
    shown = capsys.readouterr()
    assert "--partion=gpu" in shown.out
    assert "launch.sbatch.partion" in shown.err and "Did you mean launch.sbatch.partition?" in shown.err
    assert "cpus" not in shown.err


def test_gpus_without_a_process_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--dry-run", "launch.gpus_per_node=8", "launch.num_processes=2"]) == 0
    assert "launch.num_processes=8" in capsys.readouterr().err


def test_setup_of_several_lines_is_taken() -> None:
    lines = ["if true; then", "  export A='it is \"quoted\" $HOME'", "fi"]
    text = render_run(RunConfig(launch=LaunchConfig(setup=lines)))
    assert "\n".join(lines) in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("output_dir", ["a:b", "a,b"])
def test_folder_that_a_container_cannot_mount_is_refused(output_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir=.* launch\.container"):
        render_run(RunConfig(output_dir=output_dir, launch=LaunchConfig(container="/images/torch.sqsh")))


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:24.01-py3", "/images/with space 'and' quotes.sqsh"])
def test_container_is_one_word_for_srun(image: str) -> None:
    text = render_run(RunConfig(launch=LaunchConfig(container=image)))
    (line,) = [line for line in text.splitlines() if line.strip().startswith('srun --nodes="$SLURM')]
    shown = subprocess.run(
        ["bash", "-c", line.replace("srun", "printf '%s\\n'", 1).rstrip("\\")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--container-image={image}" in shown.stdout.splitlines()
