"""Inherited variables that would change a run are not inherited: promise 7."""

from __future__ import annotations

import io
import os

import pytest

from launcher.base.environment import clean_rank, other_engines, without_inherited
from launcher.base.output import SurvivingStream
from tests.gpu.start import GROUP_OF_ONE

POD = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "pod-0", "MASTER_PORT": "2222"}


def test_agents_environment_holds_nothing_that_describes_other_processes() -> None:
    kept = {"HOME": "/h", "HF_TOKEN": "x", "OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0"}
    dropped = {
        **POD, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "PET_NPROC_PER_NODE": "8", "TORCHELASTIC_RUN_ID": "a", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "1",
        "PYTHONOPTIMIZE": "2",
    }  # fmt: skip
    assert without_inherited({**kept, **dropped}) == kept


def test_rank_of_no_agent_is_one_process_whatever_its_pod_says() -> None:
    env = {**POD, "HOME": "/h"}
    (notice,) = clean_rank(env)
    assert env == {"HOME": "/h"} and "WORLD_SIZE" in notice and "no agent" in notice


def test_rank_of_an_agent_keeps_its_place_but_not_what_divides_gradients() -> None:
    env = {**POD, "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    (notice,) = clean_rank(env)
    assert env == {**POD, "TORCHELASTIC_RUN_ID": "none"} and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in notice


def test_process_group_of_one_that_the_gpu_tests_ask_for_is_kept() -> None:
    env = dict(GROUP_OF_ONE)
    assert clean_rank(env) == [] and env == GROUP_OF_ONE


@pytest.mark.parametrize("value", ["1", "no", "false"])
def test_nothing_is_said_where_nothing_was_meant(value: str) -> None:
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": value}
    assert clean_rank(env) == [] and env == {}


def test_other_engines_are_named() -> None:
    found = other_engines({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_MEGATRON_LM": "false"})
    assert found == ["ACCELERATE_USE_FSDP"]


def test_writing_goes_on_when_nobody_reads_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = SurvivingStream(io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True))
    for _ in range(3):
        stream.write("a line\n")
        stream.flush()
    stream.close()
