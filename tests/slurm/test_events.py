"""What Slurm does to a job, on a real Slurm of two nodes. Promise 1: no step is lost or done twice, whatever happens.

The ranks are a stand-in (stand_in.py); test_training.py does the same with real ones.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import StandInRun, SubmitStandIn, submitter, talking_to

# --------------------------------------------------------------------------- the end of a job


def test_job_is_completed_when_run_finishes(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(num_steps=10)
    run.wait_completed()
    assert run.reasons() == [None]
    assert not (run.root / "STOP").exists()
    left = [p.name for p in (run.root / "slurm").iterdir() if p.is_dir()]
    assert left == [], "nothing temporary is left"


def test_job_is_failed_and_not_restarted_when_input_is_wrong(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(env={"STAND_IN_REFUSES": "data.jsonl:3 is no JSON"})
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.cluster.job(run.job_id)["ExitCode"] == "2:0"
    assert "data.jsonl:3 is no JSON" in run.log()
    assert "restarting" not in run.log()
    assert run.run_json()["state"] == "failed"


def test_job_is_failed_when_every_restart_crashes(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(env={"STAND_IN_CRASHES": "1"}, max_restarts=1)
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.log().count("restarting from the beginning") == 1
    assert (run.run_json()["state"], run.run_json()["reason"]) == ("failed", "crash")


# --------------------------------------------------------------------------- stopped from outside, and going on


def _in_order_of_step_5(runs: dict[str, StandInRun], names: list[str]) -> Iterator[str]:
    """Slurm starts jobs one after the other, and the first ones must not have ended when the last has begun."""
    while names:
        wait_for(lambda: any(runs[name].step >= 5 for name in names), 240, lambda: f"step 5 of one of {names}")
        for name in [name for name in names if runs[name].step >= 5]:
            names.remove(name)
            yield name


@pytest.fixture(scope="module")
def stopped(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StandInRun]]:
    """Runs that are each stopped in another way, all at once: Slurm lets a requeued job wait."""
    folder = tmp_path_factory.mktemp("stopped")
    with talking_to(cluster, folder):
        submit = submitter(cluster, folder)
        runs = {
            "term": submit("term", 120),
            "requeue": submit("requeue", 120),
            "cancel": submit("cancel", 120),
            "stop_file": submit("stop_file", 120),
            "refused": submit("refused", 120, sbatch={"requeue": False}),
            "bounded": submit("bounded", 120, max_requeues=0),
            "time_limit": submit(
                "time_limit",
                100,
                sbatch={"time": "1", "signal": "B:USR1@0"},
                env={"STAND_IN_MARGIN_S": "50", "SLURM_TIME_FORMAT": "relative"},
            ),
            "backstop": submit(
                "backstop",
                150,
                step_s=0.4,
                sbatch={"time": "1"},
                setup=["unset SLURM_JOB_END_TIME", "squeue() { false; }"],
            ),
        }
        actions: dict[str, Callable[[StandInRun], object]] = {
            **dict.fromkeys(
                ("term", "refused", "bounded"), lambda run: cluster.run("scancel", "-s", "TERM", run.job_id)
            ),
            "requeue": lambda run: cluster.run("scontrol", "requeue", run.job_id),
            "cancel": lambda run: cluster.run("scancel", run.job_id),
            "stop_file": lambda run: (run.root / "STOP").touch(),
        }
        for name in _in_order_of_step_5(runs, [*actions]):
            actions[name](runs[name])
        yield runs


def test_job_continues_when_scancel_sends_term(stopped: dict[str, StandInRun]) -> None:
    run = stopped["term"]
    run.wait_completed()
    assert run.reasons() == ["signal", None]
    assert run.cluster.job(run.job_id)["Restarts"] == "1"


def test_job_continues_when_requeued_by_hand(stopped: dict[str, StandInRun]) -> None:
    run = stopped["requeue"]
    run.wait_completed()
    assert run.reasons() == ["signal", None]
    assert "Slurm has requeued" in run.log()


def test_job_saves_and_is_not_requeued_when_cancelled(stopped: dict[str, StandInRun]) -> None:
    run = stopped["cancel"]
    run.cluster.wait_state(run.job_id, "CANCELLED")
    assert run.reasons() == ["signal"]
    assert "cancelled: not requeued" in run.log()


def test_job_is_not_requeued_when_user_writes_stop_file(stopped: dict[str, StandInRun]) -> None:
    run = stopped["stop_file"]
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.cluster.job(run.job_id)["ExitCode"] == "75:0"
    assert run.reasons() == ["stop_file"]


def test_job_goes_on_in_another_when_requeue_is_refused(stopped: dict[str, StandInRun]) -> None:
    run = stopped["refused"]
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.cluster.job(run.job_id)["ExitCode"] == "75:0"
    run.job_id = (run.root / "slurm" / "job_id").read_text().strip()
    run.wait_completed()
    assert [end["job"] for end in run.ends()][-1] == run.job_id
    assert run.reasons() == ["signal", None]


def test_job_ends_when_max_requeues_is_reached(stopped: dict[str, StandInRun]) -> None:
    run = stopped["bounded"]
    run.cluster.wait_state(run.job_id, "FAILED")
    assert "launch.max_requeues=0 is reached" in run.log()


def test_job_continues_over_several_when_time_limit_is_near(stopped: dict[str, StandInRun]) -> None:
    """The ranks stop by themselves, STAND_IN_MARGIN_S before the end that the script tells them."""
    run = stopped["time_limit"]
    run.wait_completed()
    assert set(run.reasons()[:-1]) == {"time_limit"}
    assert len(run.reasons()) >= 2


def test_job_stops_for_the_time_limit_when_only_the_backstop_signal_comes(stopped: dict[str, StandInRun]) -> None:
    """SIGUSR1, a minute before the end of a job of one minute; Slurm looks every half minute."""
    run = stopped["backstop"]
    wait_for(lambda: run.reasons() == ["time_limit"], 240, lambda: run.log())
    run.cluster.run("scancel", run.job_id)


@pytest.mark.slow
def test_job_continues_when_the_time_limit_comes_unannounced(submit_stand_in: SubmitStandIn) -> None:
    """No stop of its own and no SIGUSR1: only the SIGTERM that Slurm sends KillWait before the kill."""
    run = submit_stand_in(num_steps=900, sbatch={"time": "1", "signal": "B:USR1@0"}, env={"STAND_IN_MARGIN_S": "-900"})
    run.wait_completed(240)
    assert run.reasons() == ["time_limit", None]


def test_job_continues_when_preempted(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in(num_steps=80)
    run.wait_step(5)
    with run.cluster.occupied() as other:
        run.cluster.wait_state(other, "RUNNING")
        assert run.run_json()["state"] == "interrupted"
    run.wait_completed()
    assert run.reasons() == ["preempted", None]


@pytest.mark.slow
@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_job_is_requeued_when_the_signal_comes_before_the_agents_can_handle_it(
    submit_stand_in: SubmitStandIn, number: str
) -> None:
    """Python has only begun: the signal kills."""
    modules = Path("modules")
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(_SLOW_IMPORT, encoding="utf-8")
    run = submit_stand_in()
    wait_for(lambda: len(list(modules.glob("importing-*"))) == 2, 60, lambda: f"both agents\n{run.log()}")
    run.cluster.run("scancel", "-s", number, run.job_id)
    run.wait_completed()
    assert run.cluster.job(run.job_id)["Restarts"] == "1"
    assert "stopped before the start" in run.log() and "an agent was lost" not in run.log()


_SLOW_IMPORT = """
import os, pathlib, sys, time
if "launcher.slurm.node" in sys.orig_argv and not os.environ.get("SLURM_RESTART_COUNT"):
    pathlib.Path(__file__).with_name("importing-" + os.environ["SLURM_NODEID"]).touch()
    time.sleep(8)
"""


# --------------------------------------------------------------------------- faults


def test_both_nodes_restart_inside_the_job_when_a_rank_is_killed(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in()
    run.wait_step(12)
    survivor = run.pid(0)
    os.kill(run.pid(1), signal.SIGKILL)
    run.wait_completed()
    assert run.pid(0) != survivor
    assert run.cluster.job(run.job_id)["Restarts"] == "0"
    assert "restarting from the last checkpoint (1 of" in run.log()


def test_job_continues_when_a_node_is_set_down(submit_stand_in: SubmitStandIn) -> None:
    run = submit_stand_in()
    run.wait_step(12)
    run.cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    wait_for(lambda: run.cluster.job(run.job_id).get("Restarts") == "1", 240, "Slurm to requeue the job")
    run.cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    run.wait_completed()


@pytest.mark.slow
def test_job_continues_when_a_node_dies_unnoticed_by_slurm(submit_stand_in: SubmitStandIn) -> None:
    """Restarts must not be used up on a node that is gone."""
    run = submit_stand_in(max_restarts=0)
    run.wait_step(12)
    agent, rank = run.agent_pid(1), run.pid(1)
    run.cluster.crash_node("n1")
    os.kill(agent, signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    try:
        wait_for(lambda: run.cluster.job(run.job_id).get("Restarts") == "1", 120, lambda: f"a requeue\n{run.log()}")
    finally:
        run.cluster.start_node("n1")
    assert "does not answer" in run.log()
    run.wait_completed()


def test_job_is_failed_when_a_node_does_not_see_output_dir(
    use_cluster: Cluster, submit_stand_in: SubmitStandIn
) -> None:
    run = submit_stand_in(output_dir=str(use_cluster.private_dir / "run"))
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.cluster.job(run.job_id)["ExitCode"] == "2:0"
    words = f"node n1 does not see in output_dir={run.root} what node n0 has written in output_dir={run.root}"
    assert words in run.log()


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_start_again_inside_the_job_when_an_agent_is_killed(submit_stand_in: SubmitStandIn, node: int) -> None:
    run = submit_stand_in()
    run.wait_step(12)
    os.kill(run.agent_pid(node), signal.SIGKILL)
    run.wait_completed()
    assert run.cluster.job(run.job_id)["Restarts"] == "0"
    assert "an agent was lost (srun ended with" in run.log() and "starting all again (1 of" in run.log()


@pytest.mark.parametrize("order", [("rank", "agent"), pytest.param(("agent", "rank"), marks=pytest.mark.slow)])
def test_lost_agents_and_killed_ranks_use_up_one_budget(submit_stand_in: SubmitStandIn, order: tuple[str, str]) -> None:
    """Not max_restarts starts of the agents with max_restarts starts of the ranks in each."""
    run = submit_stand_in(num_steps=600, max_restarts=1)
    for kind in order:
        run.wait_step(run.step + 3)
        killed = run.run_json()["attempt"]
        os.kill(run.pid(1) if kind == "rank" else run.agent_pid(1), signal.SIGKILL)
        wait_for(lambda killed=killed: run.run_json()["attempt"] != killed or run.cluster.state(run.job_id) == "FAILED",  # type: ignore[misc]
                 240, lambda: run.log())  # fmt: skip
    run.cluster.wait_state(run.job_id, "FAILED")
    assert run.log().count("(1 of ") == 1 and "(2 of " not in run.log()


# --------------------------------------------------------------------------- what the job runs


def test_job_runs_the_code_of_its_submission_when_it_is_edited_later(submit_stand_in: SubmitStandIn) -> None:
    module = Path("my_metric.py")
    module.write_text("VALUE = 'submitted'\n", encoding="utf-8")
    run = submit_stand_in(num_steps=2, env={"STAND_IN_IMPORTS": "my_metric"}, sbatch={"begin": "now+3"})
    module.write_text("VALUE = 'edited'\n", encoding="utf-8")
    run.wait_completed()
    file, value = (run.root / "imported").read_text().split()
    assert value == "submitted"
    assert Path(file).is_relative_to(run.root / "code")


def test_job_runs_when_output_dir_and_values_hold_spaces_and_quotes(submit_stand_in: SubmitStandIn) -> None:
    words = 'it\'s "so" $HOME `id`'
    run = submit_stand_in(output_dir='a b\'s "c"', num_steps=3, env={"WORDS": words}, setup=['echo "<$WORDS>"'])
    run.wait_completed()
    assert f"<{words}>" in run.log()
