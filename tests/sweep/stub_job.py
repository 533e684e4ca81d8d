"""Stands in for one training run: `stub_job.py OVERRIDE…` keeps the promises that the sweep relies on.

run.json, metrics.jsonl, the STOP file, SIGTERM and resuming are those of a real run. A step mixes its number into a
digest that a checkpoint carries, so that a lost, repeated or skipped step shows in the result.
Environment: STUB_STEPS, STUB_STEP_S, STUB_DEVICES (a folder: who uses a device locks a file there), STUB_FAIL (a text
in the arguments of jobs that fail), STUB_IGNORE_STOP, STUB_LAST (a text in the arguments of the job that ends only when
STUB_OTHERS others have).
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = int(os.environ.get("STUB_STEPS", "4"))
STEP_S = float(os.environ.get("STUB_STEP_S", "0.01"))
SAVE_EVERY = 2
LOCKS = []
signalled = False


def arguments() -> dict[str, str]:
    return {key.lstrip("+"): value.strip("'") for key, _, value in (a.partition("=") for a in sys.argv[1:])}


def hold(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    LOCKS.append(path.open("w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        (path.parent / "OVERLAP").write_text(path.name)


def replace(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def on_signal(number: int, frame: object) -> None:
    global signalled
    if signalled and number == signal.SIGINT:
        os._exit(1)
    signalled = True


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    args = arguments()
    root = Path(args["output_dir"])
    hold(root / "stub.lock")
    if "STUB_DEVICES" in os.environ:
        for device in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
            hold(Path(os.environ["STUB_DEVICES"]) / device)
    fail = os.environ.get("STUB_FAIL")
    if fail and fail in " ".join(sys.argv):
        print("stub: failing as asked")
        return 1
    stop = root / "STOP"
    stop.unlink(missing_ok=True)
    saved = root / "progress.json"
    step, digest = json.loads(saved.read_text()) if saved.exists() else (0, "")
    metrics = root / "metrics.jsonl"
    old = metrics.read_text().splitlines() if metrics.exists() else []
    temporary = root / ".metrics"
    temporary.write_text("".join(f"{x}\n" for x in old if x.endswith("}") and json.loads(x)["step"] <= step))
    temporary.replace(metrics)
    rate = float(args.get("optim.learning_rate", "0.1"))
    state: dict[str, object] = {"reason": None, "step": step, "total_steps": STEPS}  # killed after its last step
    while step < STEPS:
        time.sleep(STEP_S)
        step += 1
        digest = hashlib.sha256(f"{digest}{step}{args.get('seed')}{rate}".encode()).hexdigest()
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "loss": rate + 1 / step, "tokens_per_second": 5.0}) + "\n")
            file.write(json.dumps({"step": step, "eval_loss": rate + 1 / step}) + "\n")
        text = stop.read_text().strip() if stop.exists() else None
        is_stopped = (text is not None or signalled) and not os.environ.get("STUB_IGNORE_STOP")
        if is_stopped or step % SAVE_EVERY == 0:
            replace(saved, [step, digest])
        state = {"state": "running", "reason": None, "step": step, "total_steps": STEPS, "exit_code": None}
        if is_stopped and step < STEPS:
            stop.unlink(missing_ok=True)
            is_pruned = text == "pruned"
            state |= {"state": "pruned" if is_pruned else "interrupted", "reason": None if is_pruned else "signal"}
            replace(root / "run.json", {**state, "exit_code": 75})
            return 75
        replace(root / "run.json", state)
    last = os.environ.get("STUB_LAST")
    while last and last in " ".join(sys.argv):
        if len(list(root.parent.glob("*/ended.log"))) >= int(os.environ["STUB_OTHERS"]):
            break
        time.sleep(0.02)
    with (root / "ended.log").open("a") as file:
        file.write(f"{digest}\n")
    replace(root / "run.json", {**state, "state": "finished", "exit_code": 0})
    return 0


if __name__ == "__main__":
    sys.exit(main())
