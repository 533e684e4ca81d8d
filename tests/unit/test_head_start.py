"""`accelerate launch` begins while the settings are composed, and is then what the command would have started."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launcher.agent import head_start
from launcher.base.process import is_alive
from tests.distributed.runs import wait_until

_PROLOGUE = """
import os, signal, sys, time
from pathlib import Path
from launcher.agent import head_start
from launcher.agent.head_start import MODULE
from launcher.base import forks
COMMAND = [sys.executable, "-m", MODULE, "--one", "two"]

def run(code):
    forks.runpy.run_module = lambda name, **_: exec(code, {})
"""


def _run(script: str, *arguments: str, cwd: Path | None = None) -> str:
    command = [sys.executable, *arguments, "-c", _PROLOGUE + textwrap.dedent(script)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=240, cwd=cwd, stdin=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_what_the_command_would_have_been(tmp_path: Path) -> None:
    printed = _run(
        """
        run('''if True:
            import atexit, os, signal, sys
            atexit.register(lambda: print("the end", flush=True))
            print(sys.argv[1:], sys.orig_argv[1:], os.environ["GIVEN"], repr(sys.stdin.read()))
            print(sys.path[0] == os.getcwd(), os.getsid(0) == os.getpid(), file=sys.stderr)
            print("9" in os.listdir("/proc/self/fd"))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            sys.exit(9)
        ''')
        sys.path[0] = "/the/folder/of/a/script"
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        os.dup2(0, 9)  # `9> lock` in a shell
        log = open("log", "a")
        print("before", file=log, flush=True)
        begun = head_start.head_start()
        output = f"/proc/{os.getpid()}/fd/{log.fileno()}"
        print(begun.begin(COMMAND, {**os.environ, "GIVEN": "a\\nb"}, output=output), begun.wait())
        """,
        cwd=tmp_path,
    )
    assert printed == "True 9\n"
    assert (tmp_path / "log").read_text().splitlines() == [
        "before", f"['--one', 'two'] {['-m', head_start.MODULE, '--one', 'two']} a", "b ''", "True True", "False",
        "the end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("pass", 0, []),
        ("sys.exit()", 0, []),
        ("sys.exit('a word')", 1, ["a word"]),
        ("raise ValueError('wrong')", 1, ["ValueError: wrong"]),
        ("os.kill(os.getpid(), 9)", -9, []),
    ],
)
def test_it_ends_as_the_command_would(tmp_path: Path, end: str, code: int, told: list[str]) -> None:
    printed = _run(
        f"""
        run("import os, sys; {end}")
        open("log", "w").close()
        begun = head_start.head_start()
        print(begun.begin(COMMAND, os.environ, output="log"), begun.wait())
        """,
        cwd=tmp_path,
    )
    assert printed == f"True {code}\n"
    assert (tmp_path / "log").read_text().splitlines()[-1:] == told


@pytest.mark.parametrize(
    "change", ["env['OMP_NUM_THREADS'] = '3'", "env['HF_HOME'] = '/x'", "COMMAND[2] = 'json.tool'"]
)
def test_the_command_is_started_where_it_would_differ(change: str) -> None:
    script = f"env = {{**os.environ}}\n{change}\nbegun = head_start.head_start()\n"
    assert _run(f"{script}print(begun.begin(COMMAND, env)); begun.end(); print(begun.returncode)") == "False\n-9\n"


@pytest.mark.parametrize("obstacle", ["import numpy", "import threading; threading.Timer(30, print).start()"])
def test_there_is_none_where_a_fork_would_not_be_the_same(obstacle: str) -> None:
    assert _run(f"{obstacle}\nprint(head_start.head_start(), flush=True); os._exit(0)") == "None\n"


@pytest.mark.parametrize("flag", ["-O", "-P", "-E"])
def test_there_is_none_where_flags_are_of_this_interpreter_alone(flag: str) -> None:
    assert _run("print(head_start.head_start())", flag) == "None\n"


def test_there_is_none_where_there_can_be_no_more_processes() -> None:
    script = """
        def fork():
            raise OSError(11, "no more")
        os.fork = fork
        before = os.listdir("/proc/self/fd")
        print(head_start.head_start(), os.listdir("/proc/self/fd") == before)
        """
    assert _run(script) == "None True\n"


def test_what_it_imports_reads_no_number_of_threads() -> None:
    printed = _run("head_start._import_libraries(); print({'numpy', 'torch', 'transformers'} & set(sys.modules))")
    assert printed == "set()\n"


@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_it_ends_with_who_began_it(how: str) -> None:
    script = f"begun = head_start.head_start()\nprint(begun.pid, flush=True)\n{how}"
    done = subprocess.run(
        [sys.executable, "-c", _PROLOGUE + script], text=True, capture_output=True, timeout=240, check=False
    )
    wait_until(lambda: not is_alive(int(done.stdout), None), "its end", 60.0)
