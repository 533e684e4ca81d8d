"""Stands in for `accelerate launch -m launcher.train` on one node: a run of tiny steps that obeys what ranks obey.

Its "weights" are a hash chain over the steps, so that a step lost or done twice shows. The first node does the steps
and saves every 5th, and fails, as a collective would, where a peer has gone; the others only wait.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import yaml

SAVE_STEPS = 5


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
    temporary.rename(path)


def expected_weights(max_steps: int) -> str:
    text = ""
    for step in range(max_steps):
        text = hashlib.sha256(f"{text}{step}".encode()).hexdigest()
    return text


class MainNode:
    def __init__(self, root: Path, num_nodes: int, max_steps: int, step_s: float) -> None:
        self.root, self.max_steps, self.step_s = root, max_steps, step_s
        self.peers = [peer(root, node) for node in range(1, num_nodes)]
        self.checkpoint = root / "checkpoint.json"
        saved = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else {"step": 0, "weights": ""}
        self.step, self.weights = saved["step"], saved["weights"]
        end = os.environ.get("LAUNCHER_JOB_END_TIME")
        self.stop_at = float(end) - float(os.environ.get("STAND_IN_MARGIN_S", "0")) if end else float("inf")

    def report(self, state: str, reason: str | None = None) -> None:
        fields = {"state": state, "reason": reason, "step": self.step, "attempt": os.environ["LAUNCHER_ATTEMPT"]}
        write(self.root / "run.json", fields)
        if state != "running":
            with (self.root / "ends.jsonl").open("a") as ends:
                ends.write(json.dumps(fields | {"job": os.environ["SLURM_JOB_ID"]}) + "\n")

    def save(self) -> None:
        write(self.checkpoint, {"step": self.step, "weights": self.weights})
        folder = self.root / f"checkpoint-{self.step}"
        folder.mkdir(exist_ok=True)
        write(folder / "manifest.json", {})

    def stop_reason(self) -> str | None:
        stop = self.root / "STOP"
        if stop.exists():
            reason = stop.read_text() or "stop_file"
            stop.unlink()
            return reason
        return "time_limit" if time.time() > self.stop_at else None

    def run(self) -> None:
        self.report("running")
        while self.step < self.max_steps:
            time.sleep(self.step_s)
            if not all(Path(f"/proc/{pid}").exists() for pid in self.peers):
                sys.exit(1)
            self.weights = hashlib.sha256(f"{self.weights}{self.step}".encode()).hexdigest()
            self.step += 1
            if self.step % SAVE_STEPS == 0:
                self.save()
                self.report("running")
            reason = self.stop_reason()
            if reason is not None:
                self.save()
                return self.report("interrupted", reason)
        self.save()
        return self.report("finished")


def peer(root: Path, node: int) -> int:
    """The process of another node in this start, once it is there."""
    while True:
        text = (root / f"peer-{node}").read_text() if (root / f"peer-{node}").exists() else ""
        if text and json.loads(text)["attempt"] == os.environ["LAUNCHER_ATTEMPT"]:
            return int(json.loads(text)["pid"])
        time.sleep(0.05)


def wait_for_main(root: Path) -> None:
    while True:
        time.sleep(0.1)
        run = json.loads((root / "run.json").read_text()) if (root / "run.json").exists() else {}
        if run.get("attempt") == os.environ["LAUNCHER_ATTEMPT"] and run["state"] != "running":
            return


def refuse(message: str, code: int) -> None:
    """As `launcher.train.rank_setup.fail` tells an error of the product's own."""
    report = {"rank": 0, "time": time.time(), "exit_code": code, "kind": "DataError", "is_ours": True}
    report["message"] = message
    write(Path(os.environ["LAUNCHER_ERROR_DIR"]) / "error-rank-0.json", report)
    sys.exit(1)


def main() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "the script shields the ranks from SIGTERM"
    parser = argparse.ArgumentParser()
    parser.add_argument("--num_machines", type=int, required=True)
    parser.add_argument("--machine_rank", type=int, default=0)
    parser.add_argument("--main_process_ip")
    parser.add_argument("--config-file", required=True)
    given, _ = parser.parse_known_args()
    root = Path(yaml.safe_load(Path(given.config_file).read_text())["output_dir"])
    write(root / f"pid-{given.machine_rank}", os.getpid())
    write(root / f"peer-{given.machine_rank}", {"attempt": os.environ["LAUNCHER_ATTEMPT"], "pid": os.getpid()})
    if given.num_machines > 1:
        socket.getaddrinfo(given.main_process_ip, 1)
    if message := os.environ.get("STAND_IN_REFUSES"):
        refuse(message, 2)
    if os.environ.get("STAND_IN_CRASHES"):
        sys.exit(3)
    if module := os.environ.get("STAND_IN_IMPORTS"):
        (root / "imported").write_text(__import__(module).__file__ + " " + __import__(module).VALUE)
    if given.machine_rank:
        return wait_for_main(root)
    return MainNode(
        root, given.num_machines, int(os.environ["STAND_IN_STEPS"]), float(os.environ["STAND_IN_STEP_S"])
    ).run()


if __name__ == "__main__":
    main()
