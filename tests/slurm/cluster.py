"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd of the test's own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.agent.command import free_port

NODES = ("n0", "n1")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")

_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmctldPort={ctl_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
MinJobAge=600
KillWait=20
MailProg=/bin/true
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n0_port} CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=20 MaxTime=60 State=UP
PartitionName=high Nodes=n0,n1 PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here, or ''."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} not found): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd of the tests are started as root; this is another user"


def _free_ports(count: int) -> list[int]:
    """Different ones. The kernel might give those of its own to others before Slurm's daemons take them."""
    found = set[int]()
    while len(found) < count:
        found.add(free_port())
    return list(found)


class Cluster:
    """Starts, asks and ends the two nodes. `private_dir` is a folder that n1 sees differently from n0."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private_dir = root / "private"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        self.env["PATH"] = f"{self.env['PATH']}:/usr/sbin:/sbin"

    def start(self) -> None:
        for name in ("munge", "state", "private", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ctl, n0, n1 = _free_ports(3)
        conf = _CONF.format(root=self.root, ctl_port=ctl, n0_port=n0, n1_port=n1)
        (self.root / "slurm.conf").write_text(conf, encoding="utf-8")
        munge = self.root / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *options])
        wait_for(lambda: (munge / "socket").exists(), 120, "munged's socket")
        self._daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split().count("idle") >= 4, 240, "two idle nodes")

    def start_node(self, node: str) -> None:
        mount = f"mount -t tmpfs none {self.private_dir} && " if node == "n1" else ""
        self._daemon(node, ["unshare", "--mount", "bash", "-c", f"{mount}exec slurmd -D -N {node}"])

    def crash_node(self, node: str) -> None:
        """What is left of a node without power: nothing of its daemons answers. Its tasks are the caller's to kill."""
        daemon = self._daemons.pop(node)
        for text in self.run("pgrep", "--full", f"slurmstepd.*{node}", check=False).split():
            os.kill(int(text), signal.SIGKILL)
        daemon.kill()
        daemon.wait()

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:
                self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
                self.run("scancel", *jobs, check=False)
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), 30, "an empty queue")
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    # ------------------------------------------------------------------ what the tests ask

    def job(self, job_id: str) -> dict[str, str]:
        """scontrol's fields of a job; {} once Slurm has forgotten it."""
        text = self.run("scontrol", "-o", "show", "job", job_id, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0])) if "JobId=" in text else {}

    def state(self, job_id: str) -> str:
        return self.job(job_id).get("JobState", "GONE")

    def wait_state(self, job_id: str, *states: str, timeout_s: float = 240) -> str:
        wait_for(
            lambda: self.state(job_id) in states,
            timeout_s,
            lambda: f"job {job_id} to be {' or '.join(states)}: {self.job(job_id)}",
        )
        return self.state(job_id)

    @contextlib.contextmanager
    def occupied(self, partition: str = "high", *options: str) -> Iterator[str]:
        """Both nodes wanted by a job of another user's."""
        job_id = self.run(
            "sbatch", "--parsable", "-p", partition, "-N2", "--exclusive", "-o", "/dev/null", *options,
            "--wrap", "sleep 600",
        ).strip()  # fmt: skip
        try:
            yield job_id
        finally:
            self.run("scancel", job_id, check=False)


def wait_for(
    condition: Callable[[], object], timeout_s: float, what: str | Callable[[], str], poll_s: float = 0.2
) -> None:
    """Polls until the condition holds; fails naming what did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{timeout_s:g} s without {what() if callable(what) else what}")
        time.sleep(poll_s)
