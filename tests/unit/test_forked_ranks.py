"""Ranks that are forks: told what to be, they are that to everybody; where they cannot be, the command is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launcher.base.devices import num_cores
from launcher.base.forks import arguments_behind
from launcher.base.process import is_alive, start_ticks
from tests.distributed.runs import wait_until

RANK = [sys.executable, "-u", "-m", "launcher.train", "model=tiny", "output_dir=a b"]
PROLOGUE = r"""
import os, signal, subprocess, sys, threading, time, types
from pathlib import Path
from launcher.base import forks
from launcher.train import forked_ranks
RANK = [sys.executable, "-u", "-m", "launcher.train", "model=tiny", "output_dir=a b"]

def killed(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def told(*_, **__):
    # what a rank would run: written down, and an end as asked for
    proc = Path("/proc/self")
    lines = [
        os.fsdecode((proc / "cmdline").read_bytes()), os.fsdecode((proc / "environ").read_bytes()), repr(sys.argv[1:]),
        repr(sys.orig_argv[1:]), str(os.getsid(0) == os.getpid()), os.environ.get("GIVEN", ""), str(os.getppid()),
    ]
    Path(os.environ["TOLD"]).write_text("\n".join(lines), errors="surrogateescape")
    if os.environ["END"] == "wait":
        time.sleep(100)
    os._exit(int(os.environ["END"]))

forks.runpy.run_module = told
forked_ranks._LIBRARIES = ("json",)
ranks = forked_ranks.ForkedRanks()
ranks.import_libraries()
env = {**os.environ, "GIVEN": "caf\udce9", "END": "7", "TOLD": sys.argv[1]}
"""


def _run(tmp_path: Path, script: str, **env: str) -> tuple[list[str], list[str]]:
    """(lines that it prints, lines that the rank told)."""
    told = tmp_path / "told"
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(script), str(told)], text=True, capture_output=True,
        timeout=240, env={**os.environ, **env}, errors="surrogateescape",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), told.read_bytes().decode(errors="replace").splitlines() if told.exists() else []


def test_a_fork_is_what_the_command_would_have_been(tmp_path: Path) -> None:
    lines, told = _run(
        tmp_path,
        """
        ranks.fork(1)
        rank = ranks.popen(RANK, env, start_new_session=True)
        print(type(rank).__name__, rank.wait(), rank.poll(), rank.returncode, os.getpid())
        """,
    )
    kind, *codes, pid = lines[0].split()
    assert (kind, codes) == ("Fork", ["7", "7", "7"])
    command, variables, arguments, orig, leads_session, _, parent = told
    assert command.split("\0")[:-1] == RANK
    assert "END=7" in variables.split("\0")
    assert arguments == "['model=tiny', 'output_dir=a b']"
    assert orig == repr(RANK[1:])
    assert leads_session == "True"
    assert parent == pid


def test_every_fork_gets_its_own_order(tmp_path: Path) -> None:
    lines, _ = _run(
        tmp_path,
        """
        ranks.fork(3)
        begun = [ranks.popen(RANK, {**env, "END": str(n), "TOLD": sys.argv[1] + str(n)}) for n in range(3)]
        print([rank.wait() for rank in begun], len({rank.pid for rank in begun}))
        """,
    )
    assert lines == ["[0, 1, 2] 3"]
    assert [(tmp_path / f"told{n}").read_text(errors="replace").count(f"END={n}") for n in range(3)] == [1, 1, 1]


def test_a_signal_and_a_time_limit_are_told_as_by_popen(tmp_path: Path) -> None:
    lines, _ = _run(
        tmp_path,
        """
        ranks.fork(1)
        rank = ranks.popen(RANK, {**env, "END": "wait"})
        try:
            rank.wait(0.2)
        except subprocess.TimeoutExpired:
            print("late", rank.poll())
        os.kill(rank.pid, signal.SIGKILL)
        print(rank.wait(10), rank.returncode)
        """,
    )
    assert lines == ["late None", "-9 -9"]


@pytest.mark.parametrize(
    "change",
    [
        "env['OMP_NUM_THREADS'] = '3'", "env['LD_PRELOAD'] = ''", "env.pop('HF_HOME', None); env['HF_HOME'] = '/x'",
        "killed(ranks._waiting[0].pid)", "ranks._waiting.clear()",
        "RANK[3] = 'json.tool'", "RANK[0] = '/bin/true'",
    ],
)  # fmt: skip
def test_the_command_is_started_where_a_fork_would_differ(tmp_path: Path, change: str) -> None:
    lines, told = _run(
        tmp_path,
        f"""
        ranks.fork(1)
        {change}
        subprocess.Popen = lambda args, env, stdout, stderr, start_new_session: print("Popen", args == RANK)
        ranks.popen(RANK, env)
        """,
    )
    assert lines == ["Popen True"]
    assert not told


@pytest.mark.parametrize(
    "obstacle",
    [
        "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()",
        "forks.show_as = lambda command, env: False",
        "os.readlink = lambda path: '/dev/nvidiactl'",
        "os.readlink = lambda path: '/dev/dri/renderD128'",
        "forks._PROC = Path('/nothing-is-mounted')",
        "forked_ranks._LIBRARIES = ('no_such',); ranks = forked_ranks.ForkedRanks(); ranks.import_libraries()",
        "os.fork = lambda: os.open('/nothing/there', 0)",
        "import codecs; sys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)",
        "sys.modules['sitecustomize'] = types.SimpleNamespace(__file__='/of/mine/sitecustomize.py')",
        "sys.modules['usercustomize'] = types.SimpleNamespace(__file__='/of/mine/usercustomize.py')",
    ],
)
def test_nothing_is_forked_where_it_is_unsafe(tmp_path: Path, obstacle: str) -> None:
    lines, _ = _run(tmp_path, f"{obstacle}\nranks.fork(2)\nprint(len(ranks._waiting))")
    assert lines == ["0"]


@pytest.mark.skipif(num_cores() < 2, reason="OpenBLAS has no threads on a single core")
def test_threads_of_openblas_are_no_obstacle(tmp_path: Path) -> None:
    """numpy brings them with several cores for each rank; they end before a fork."""
    lines, _ = _run(
        tmp_path,
        """
        import numpy
        print(len(os.listdir("/proc/self/task")) > 1)
        ranks.fork(2)
        print(len(ranks._waiting))
        print([ranks.popen(RANK, env).wait() for _ in range(2)])
        numpy.ones((600, 600)) @ numpy.ones((600, 600))
        print(len(os.listdir("/proc/self/task")) > 1)
        """,
        OMP_NUM_THREADS="2",
    )
    assert lines == ["True", "2", "[7, 7]", "True"]


@pytest.mark.parametrize(("driver", "package", "expected"), [(True, True, "0"), (True, False, "2"), (False, True, "2")])
def test_nothing_is_imported_in_vain_where_that_opens_a_gpu(
    tmp_path: Path, driver: bool, package: bool, expected: str
) -> None:
    script = f"""
        ranks = forked_ranks.ForkedRanks()
        forked_ranks._GPU_DRIVER = Path("/proc" if {driver} else "/nothing/of/that/name")
        if {package}:
            Path(sys.argv[1] + "-d").mkdir()
            Path(sys.argv[1] + "-d/flash_attn.py").touch()
            sys.path.append(sys.argv[1] + "-d")
        ranks.import_libraries()
        ranks.fork(2)
        print(len(ranks._waiting))
    """
    assert _run(tmp_path, script)[0] == [expected]


def test_start_up_code_of_a_distribution_is_no_obstacle(tmp_path: Path) -> None:
    script = """
        import sysconfig
        path = sysconfig.get_path("stdlib") + "/sitecustomize.py"
        sys.modules["sitecustomize"] = types.SimpleNamespace(__file__=path)
        ranks.fork(2)
        print(len(ranks._waiting))
    """
    assert _run(tmp_path, script) == (["2"], [])


def test_an_ignored_end_counts_as_one(tmp_path: Path) -> None:
    """As for subprocess.Popen: whoever ignores SIGCHLD learns of no exit code."""
    script = """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        ranks.fork(2)
        ended = [ranks.popen(RANK, env) for _ in range(2)]
        print(ended[0].wait())
        while ended[1].poll() is None:
            time.sleep(0.01)
        print(ended[1].returncode)
    """
    lines, _ = _run(tmp_path, script)
    assert lines == ["0", "0"]


def test_forks_that_are_never_told_end(tmp_path: Path) -> None:
    lines, told = _run(tmp_path, "ranks.fork(3)\nprint(*(rank.pid for rank in ranks._waiting))")
    for pid in map(int, lines[0].split()):
        wait_until(lambda pid=pid: not is_alive(pid, None), f"the end of {pid}", 60.0)  # type: ignore[misc]
    assert not told


def test_forks_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = PROLOGUE + (
        "ranks.fork(2)\nranks.popen(RANK, {**env, 'END': 'wait'})\n"
        "print(*(int(n) for n in Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()))\n"
        "sys.stdout.flush()\ntime.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "told")], text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(start_ticks(pid) for pid in pids)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for pid in pids:
        wait_until(lambda pid=pid: start_ticks(pid) is None, f"the end of {pid}", 60.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (RANK, ["model=tiny", "output_dir=a b"]),
        ([sys.executable, "-m", "launcher.train"], []),
        ([sys.executable, "-m", "launcher.training", "a"], None),
        ([sys.executable, "-m", "other", "-m", "launcher.train"], None),
        (["python-other", "-m", "launcher.train"], None),
        ([sys.executable], None),
    ],
)
def test_a_rank_is_known_by_its_command(command: list[str], expected: list[str] | None) -> None:
    assert arguments_behind("launcher.train", command) == expected


def test_the_places_that_start_ranks_are_still_there() -> None:
    """torch and Accelerate are asked by name; where they change, ranks start slowly, and in silence."""
    script = (
        "from accelerate.commands import launch\n"
        "from launcher.train.forked_ranks import ForkedRanks\n"
        "from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler\n"
        "ranks = ForkedRanks()\nranks._has_libraries = True\n"
        "ranks.fork(1)\n"
        "ranks.popen = lambda args, env, **more: print('asked for', *args) or launch.sys.exit(0)\n"
        "ranks.begin_in_place_of_popen(launch)\n"
        "try:\n    SubprocessHandler('a', ('b',), {}, None, None, 0, None)\nexcept SystemExit:\n    pass\n"
        "launch.prepare_simple_launcher_cmd_env = lambda args: (['c'], {})\n"
        "launch.simple_launcher(None)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], text=True, capture_output=True, timeout=240)
    assert done.stdout.splitlines() == ["asked for a b", "asked for c"], done.stderr
