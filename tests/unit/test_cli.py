"""The command: verbs, help, messages, exit codes, and that none of it waits for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.base.errors import EXIT_STOPPED, HubError

_HEAVY = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "peft")

_PROBE = f"""
import json, sys, time
start = time.process_time()
from launcher.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
sys.stderr.write("\\n" + json.dumps({{
    "code": code, "cpu_s": time.process_time() - start, "heavy": [m for m in {_HEAVY} if m in sys.modules]}}))
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def probe(*argv: str) -> tuple[dict[str, object], str, str]:
    """Runs a command in a fresh interpreter: (code, CPU seconds and heavy imports; stdout; stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *argv], capture_output=True, text=True, timeout=240, check=True, cwd=Path.cwd()
    )
    text, _, report = done.stderr.rpartition("\n")
    return json.loads(report), done.stdout, text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_an_example_and_needs_no_torch(verb: str) -> None:
    report, out, _ = probe(verb, "--help")
    assert report["code"] == 0 and "example" in out and f"launcher {verb}" in out
    assert report["heavy"] == []


def test_mistake_is_answered_within_a_second_and_without_torch() -> None:
    """The contract: a mistyped key, an unknown choice and a contradiction, in under a second of CPU."""
    report, out, err = probe("train", "bad.key=1", "strategy=zero9", "launch.num_processes=3", "launch.num_machines=2")
    assert report["code"] == 2 and out == ""
    assert float(str(report["cpu_s"])) < 1.0
    assert report["heavy"] == []
    assert "3 settings are wrong" in err and "Traceback" not in err


def test_missing_checkpoint_is_named_without_torch_when_it_is_exported() -> None:
    for more in (("--format", "safetensors"), ("--format", "trainer"), ("--format", "safetensors", "--merge")):
        report, _, err = probe("export", "missing", "served", *more)
        assert report["code"] == 2 and report["heavy"] == []
        assert "missing is no folder" in err


def test_cfg_prints_settings_that_can_be_used_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "--cfg", "job", "seed=7"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(first)
    assert cli.main(["train", "--cfg=job", "--resolve", "--config-file", "config.yaml"]) == 0
    assert capsys.readouterr().out == first
    assert "seed: 7" in first and "output_dir: outputs/arithmetic" in first


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    assert cli.main(["train", "seed=7", "--cfg", "job", "--config-dir", "more", "run_name=x"]) == 0
    assert "run_name: x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "Did you mean train?"),
        (["seed=3"], "launcher train seed=3"),
        (["train", "--foo"], "--foo is not an option"),
        (
            ["train", "--foo"],
            "Valid: --multirun, --cfg {job}, --resolve, --config-dir DIR, --config-file FILE, KEY=VALUE",
        ),
        (["doctor", "--nope"], "Valid: --json, --fix, --config-dir DIR, --config-file FILE, KEY=VALUE"),
        (["plan", "--mtbf-s", "nan"], "--mtbf-s must be above 0 and finite (got nan)"),
        (["plan", "--tokens-per-s", "inf"], "--tokens-per-s must be above 0 and finite (got inf)"),
        (["plan", "checkpoint.mtbf_s=inf", "optim.learning_rate=inf"], "checkpoint.mtbf_s=31536000"),
        (["train", "seed"], "KEY=VALUE is expected"),
        (["train", "launch.num_machines=2", "launch.num_processes=2"], "launch.main_process_ip"),
        (["train", "-m", "--config-file", "x"], "--config-file is one run"),
    ],
)
def test_wrong_use_is_told_with_code_2(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert text in captured.err and captured.out == ""


def test_sweep_is_refused_under_an_agent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "-m", "seed=1,2"]) == 2
    assert "launcher train -m" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("launcher ")
    assert cli.main([]) == 0
    assert all(verb in capsys.readouterr().out for verb in ("train",))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In place of accelerate launch: what it would have been given."""
    from launcher.agent import supervise as real

    calls: list[list[str]] = []

    def run(config: object, arguments: list[str], begun: object) -> int:
        calls.append(arguments)
        return EXIT_STOPPED

    monkeypatch.setattr(real, "run", run)
    return calls


def test_train_passes_its_arguments_and_the_exit_code_on(agent: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    assert cli.main(["train", "--config-dir", "more", "seed=3"]) == EXIT_STOPPED
    assert agent == [["seed=3", "--config-dir", "more"]]


def test_slurm_config_runs_here_and_says_so(agent: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "launch=slurm"]) == EXIT_STOPPED
    assert "launcher submit" in capsys.readouterr().err


def _fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from launcher.agent import supervise as real

    def run(config: object, arguments: list[str], begun: object) -> int:
        raise error

    monkeypatch.setattr(real, "run", run)


def test_failure_is_a_message_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_with(monkeypatch, HubError("the Hub refused: hf_" + "x1" * 15))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "launcher: the Hub refused: ***\n"


def test_unexpected_error_names_the_file_that_holds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _fails_with(monkeypatch, RuntimeError("out of luck"))
    assert cli.main(["train"]) == 1
    err = capsys.readouterr().err
    assert "unexpected RuntimeError: out of luck" in err and "Traceback" not in err
    (written,) = tmp_path.glob("launcher-error-*.txt")
    assert str(written) in err and "Traceback" in written.read_text()
    monkeypatch.setenv("LAUNCHER_DEBUG", "1")
    assert cli.main(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fails_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "launcher: interrupted\n"


def test_module_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "--version"], capture_output=True, text=True, timeout=240, check=True,
        env={**os.environ},
    )  # fmt: skip
    assert done.stdout.startswith("launcher ")


def test_unwritable_cache_is_named_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert cli.main(["train", "data.cache_dir=file/cache"]) == 2
    shown = capsys.readouterr().err
    assert "file is no folder" in shown and "data.cache_dir=FOLDER" in shown
    assert cli.main(["train", "--cfg", "job", "data.cache_dir=file/cache"]) == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["launch.env.PGPASSWORD=hunter2hunter2"], ["launch.setup=['export GITHUB_TOKEN=hunter2hunter2']"],
        ["launch.sbatch.export='ALL,PGPASSWORD=hunter2hunter2'"], ["tracker.init_kwargs.wandb.api_key=hunter2hunter2"],
        ["data.dataset_name='https://me:hunter2hunter2@host/rows'"], ["launch.env={DB_PASSWORD: hunter2hunter2}"],
        ["-m", "tracker.init_kwargs.token=hunter2hunter2,b", "output_dir=sweep"],
        ["-m", "seed=1,2", "hydra/sweeper=optuna", "output_dir=sweep",
         "hydra.sweeper.storage='postgresql://me:hunter2hunter2@db/runs'"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", [["train"], ["submit", "--dry-run"]])
def test_secret_is_refused_written_nowhere_and_not_repeated(
    verb: list[str], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*verb, *arguments]) == 2
    shown = capsys.readouterr()
    assert "looks like a secret" in shown.err and "hunter2" not in shown.out + shown.err
    assert list(Path.cwd().iterdir()) == []


def test_a_working_directory_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["status"]) == 2
    assert "the working directory is gone" in capsys.readouterr().err
