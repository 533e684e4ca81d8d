"""Which of several failures came first; a lost connection is an echo where a peer failed before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import DataError
from launcher.base.rank_reports import (
    Report,
    first_failure,
    in_words,
    is_connection_loss,
    make_report,
    read_reports,
    write_report,
)

_IN_COLLECTIVE = [
    '  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3040, in all_reduce',
    "    work.wait()",
    "RuntimeError: …",
]
_IN_DATA = ['  File "/home/me/data.py", line 3, in __getitem__', "    fetch()"]


def report(message: str, kind: str = "RuntimeError", where: list[str] = _IN_COLLECTIVE, **fields: Any) -> Report:
    made = make_report(RuntimeError(message), rank=0, training_began=True, step=3)
    made.update({"kind": kind, "traceback": where, **fields})  # type: ignore[typeddict-item]
    return made


_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"
_CUDA = (
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Cuda failure 'out of memory'"
)
_REMOTE = "NCCL error: remote process exited or there was a network error\nncclRemoteError: A call failed possibly"


@pytest.mark.parametrize(
    ("is_loss", "made"),
    [
        (True, report(_GLOO)),
        (True, report("[gloo/transport/tcp/pair.cc:534] Connection reset by peer", where=[])),
        (True, report(_REMOTE, "DistBackendError")),
        (True, report("Broken pipe", "DistNetworkError", where=[])),
        (True, report("failed to recv, got 0 bytes. Connection was likely closed.", "DistStoreError", where=[])),
        (True, report("Timed out waiting 86400000ms for recv operation to complete")),
        (False, report(_CUDA, "DistBackendError")),
        (False, report("NCCL error: invalid usage (run with NCCL_DEBUG=WARN)", "DistBackendError")),
        (False, report("HTTPSConnectionPool(host='x'): Read timed out.", "ReadTimeout", _IN_DATA)),
        (False, report("[Errno 32] Broken pipe", "BrokenPipeError", _IN_DATA)),
        (False, report("[Errno 104] Connection reset by peer", "ConnectionResetError", _IN_DATA)),
        (False, report("the Hub timed out", "HubError", is_ours=True)),
        (False, report("tensors must be contiguous")),
    ],
)
def test_a_lost_connection_is_known_by_where_it_was_raised(is_loss: bool, made: Report) -> None:
    assert is_connection_loss(made) is is_loss


def test_the_earliest_of_several_errors_is_shown() -> None:
    late, early = report(_CUDA, "DistBackendError", rank=0, time=9.0), report("boom", rank=1, time=5.0)
    assert first_failure([late, early], has_silent_death=False) is early


def test_an_echo_is_passed_over_when_a_peer_has_failed() -> None:
    """Reports of another machine may arrive a moment late."""
    echo, cause = report(_GLOO, rank=0, time=5.0), report("boom", rank=1, time=5.5)
    assert first_failure([echo, cause], has_silent_death=False) is cause
    assert first_failure([cause, echo], has_silent_death=False) is cause


def test_a_lost_connection_is_shown_when_nobody_failed_before() -> None:
    first, second = report(_GLOO, rank=2, time=5.0), report(_REMOTE, "DistBackendError", rank=0, time=6.0)
    assert first_failure([second, first], has_silent_death=False) is first
    long_after = report("boom", rank=1, time=60.0)
    assert first_failure([first, long_after], has_silent_death=False) is first


def test_lost_connections_say_nothing_when_a_rank_was_killed() -> None:
    assert first_failure([report(_GLOO)], has_silent_death=True) is None
    assert first_failure([], has_silent_death=False) is None


def test_no_report_is_lost_when_a_rank_fails_again(tmp_path: Path) -> None:
    for message in ("one", "two", "three"):
        write_report(report(message), tmp_path)
    kept = {path.name: json.loads(path.read_text())["message"] for path in tmp_path.iterdir()}
    assert kept == {"error-rank-0.1.json": "one", "error-rank-0.2.json": "two", "error-rank-0.json": "three"}
    assert [r["message"] for r in read_reports(tmp_path)] == ["three"]


def test_the_line_of_the_users_code_is_named(tmp_path: Path) -> None:
    def score() -> None:
        json.loads("{")  # raised deep inside of a library

    with pytest.raises(ValueError) as caught:
        score()
    made = make_report(caught.value, rank=1, training_began=True, step=4)
    assert made["is_users_code"] and made["where"].startswith(f"{__file__}:") and made["where"].endswith(" in score")
    text = in_words(made, tmp_path)
    assert text.startswith(f"rank 1 on {made['host']}: JSONDecodeError: ") and f"at {__file__}:" in text
    assert f"traceback: {tmp_path}/error-rank-1.json" in text


def test_an_error_of_the_product_is_shown_as_it_is(tmp_path: Path) -> None:
    made = make_report(DataError("rows.jsonl:3 is no JSON"), rank=1, training_began=False, step=None)
    assert (made["is_ours"], made["exit_code"]) == (True, 2)
    assert in_words(made, tmp_path) == "rows.jsonl:3 is no JSON"


def test_a_file_that_is_no_report_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "error-rank-0.json").write_text("{")
    (tmp_path / "error-rank-1.json").write_text('{"rank": 1, "message": "of an older version"}')
    assert [r["message"] for r in read_reports(tmp_path)] == ["of an older version"]
