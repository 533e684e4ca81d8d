"""Compiled layers: the same losses, one compilation for all lengths, and promise 1 with another compiler cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base.errors import ConfigError
from tests.distributed.runs import Lab, different, kill, losses, wait_until

pytestmark = pytest.mark.slow  # the compiler takes its time

_COMPILED = ("model.config.attention_dropout=0.0", "train.torch_compile=true")
_WIDE = (
    "model.config={model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 10, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512}", "data.packing=true",
    "data.max_length=512",
)  # fmt: skip
"""More layers than the compiler's own limit, and products large enough for the CPU's own."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.mark.parametrize(
    ("strategy", "count", "more"),
    [
        ("ddp", 2, ()),
        ("zero2", 2, ("model.gradient_checkpointing=true",)),
        ("single", 1, ("model/peft=lora", "model.peft.r=4", "model.peft.target_modules=all-linear")),
        ("single", 1, ("data.packing=true", "data.max_length=128")),
        ("single", 1, ("data.padding_free=false", "model.attn_implementation=sdpa")),
    ],
    ids=["ddp", "zero2-checkpointing", "lora", "packing", "padded"],
)
def test_losses_are_those_of_a_run_that_is_not_compiled(
    lab: Lab, tmp_path: Path, cache: dict[str, str], strategy: str, count: int, more: tuple[str, ...]
) -> None:
    more = (*more, "train.max_steps=6", "checkpoint.save_steps=6")
    expected = losses(lab.run(tmp_path / "plain", strategy, count, *_COMPILED[:1], *more))
    env = {**cache, "TORCH_LOGS": "recompiles"}
    found = losses(lab.run(tmp_path / "compiled", strategy, count, *_COMPILED, *more, env=env))
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-5
    log = (tmp_path / "compiled" / "test.log").read_text()
    assert "compiled 2 layers (LlamaDecoderLayer)" in log
    assert "Recompiling" not in log.partition("compiled 2 layers")[2]


@pytest.mark.parametrize(("strategy", "more"), [("ddp", ()), ("zero2", _WIDE)], ids=["ddp", "zero2-wide"])
def test_weights_equal_when_killed_and_continued_with_an_empty_compiler_cache(
    lab: Lab, tmp_path: Path, cache: dict[str, str], strategy: str, more: tuple[str, ...]
) -> None:
    """What the compiler decides must not depend on the lengths of the step at which a run begins."""
    overrides = (*_COMPILED, *more)
    undisturbed = lab.run(tmp_path / "a", strategy, 2, *overrides, env=cache)
    killed = tmp_path / "b"
    slow = {"FAULTS": '[{"kind": "sleep", "seconds": 0.05}, {"kind": "hang", "step": 18}]'}
    pids = lab.start(killed, strategy, 2, *overrides, env={**cache, **slow})
    wait_until(lambda: (killed / "checkpoint-10").exists(), "checkpoint-10")
    kill(pids)
    assert all(lab.zygote.wait())
    empty = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    continued = lab.run(killed, strategy, 2, *overrides, env=empty)
    assert any((tmp_path / "empty").iterdir())
    assert different(undisturbed.checkpoint_dir(20), continued.checkpoint_dir(20)) == []
    assert losses(continued) == losses(undisturbed)
    assert "layers (LlamaDecoderLayer) as 1 graph in" in (killed / "test.log").read_text()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about torch
def test_one_compilation_serves_all_lengths_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More layers than the compiler's limit of 8, with products of our own."""
    import torch
    from torch._dynamo.utils import counters

    from launcher.model import cpu_products
    from launcher.model.cpu_products import use_fast_products
    from tests.unit.test_attention import build, loss_and_gradients, settle
    from tests.unit.test_compile import compiled

    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    torch._dynamo.reset()
    counters.clear()
    model = build({"model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 10,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264})  # fmt: skip
    use_fast_products(model, torch.device("cpu"))
    attention = settle(model)
    model.train()
    lengths = [(100,), (900, 30), (2000,), (33, 33, 5)]
    expected = [loss_and_gradients(model, is_flat=True, lengths=each) for each in lengths]
    assert compiled(model, is_flat=attention.is_flat).startswith(
        "compiled 10 layers (LlamaDecoderLayer) as 1 graph in "
    )
    for each, (loss, gradients) in zip(lengths, expected, strict=True):
        found = loss_and_gradients(model, is_flat=True, lengths=each)
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert (found[1] - gradients).norm() <= 1e-4 * gradients.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_run_is_refused_when_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from launcher.model.compile import check_compiler

    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+"):
        check_compiler(torch.device("cpu"))
