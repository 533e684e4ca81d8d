"""The wheel is complete: it composes and renders without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.base.errors import UserError
from launcher.cli import init

_ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    is_there = ("-o", ".venv/.dev", f"BIN={Path(sys.executable).parent}")  # the environment is this one
    run("make", "dist", f"DIST={folder}", *is_there, cwd=_ROOT)
    (wheel,) = folder.glob("accelerate_launcher-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_everything_that_git_does(unpacked: Path) -> None:
    for top, inside in (("launcher", "launcher"), ("conf", "launcher/conf"), ("slurm", "launcher/slurm_templates")):
        wanted = {
            p.relative_to(_ROOT / top) for p in (_ROOT / top).rglob("*") if p.suffix in (".py", ".yaml", ".sbatch")
        }
        found = {p.relative_to(unpacked / inside) for p in (unpacked / inside).rglob("*")}
        assert wanted <= found
    assert "Apache License" in next(unpacked.glob("*.dist-info/licenses/LICENSE")).read_text()


def test_wheel_composes_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = "from launcher.base.paths import conf_dir; print(conf_dir())"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=unpacked).strip() == str(unpacked / "launcher/conf")
    printed = run(sys.executable, "-m", "launcher.cli", "train", "--cfg", "job", cwd=tmp_path, path=unpacked)
    assert "output_dir: outputs/arithmetic" in printed


def test_constraints_pin_every_direct_dependency_at_what_is_tested() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for requirement in needed:
        name = requirement.split(";")[0].split("[")[0]
        name = "".join(c if c.isalnum() or c in "-_." else " " for c in name).split()[0].lower()
        assert version(name).partition("+")[0] == pins[name], name


def test_init_makes_a_project_that_composes_when_only_the_wheel_is_there(unpacked: Path, tmp_path: Path) -> None:
    told = run(sys.executable, "-m", "launcher.cli", "init", "my", cwd=tmp_path, path=unpacked)
    assert "cd my && make train" in told
    printed = run(
        sys.executable,
        "-m",
        "launcher.cli",
        "train",
        "--cfg",
        "job",
        "experiment=mine",
        cwd=tmp_path / "my",
        path=unpacked,
    )
    assert "_target_: mine.Contains" in printed and "output_dir: outputs/mine" in printed
    assert {p.name for p in (tmp_path / "my").iterdir()} == {
        ".gitignore",
        "Makefile",
        "README.md",
        "conf",
        "data",
        "mine.py",
    }


@pytest.mark.parametrize("name", ["taken", "file", "/proc/my"])
def test_init_changes_nothing_when_the_folder_is_not_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="DIR="):
        init.create(tmp_path / name)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["notes.txt"] and (
        tmp_path / "file"
    ).read_text() == "mine"
