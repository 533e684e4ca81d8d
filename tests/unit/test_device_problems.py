"""Each process takes a GPU of its own: said before anything starts, not by CUDA half a minute later."""

from __future__ import annotations

import pytest

from launcher.base.devices import device_problems, precision_problems


def test_more_processes_than_gpus_are_refused_with_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert device_problems(2) == []
    (problem,) = device_problems(3, num_machines=2)
    assert "launch.num_processes=4" in problem and "2 are visible" in problem


def test_any_number_of_processes_is_taken_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_problems(8) == []


def test_fp16_is_refused_where_no_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = precision_problems("float16")
    assert "model.dtype=float16" in problem and "Set model.dtype=bfloat16" in problem
    assert precision_problems("bfloat16") == precision_problems("float16", has_gpu=True) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert precision_problems("float16") == []
