"""The loss that is trained on: summed over labelled positions only, exact however rows are padded and split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launcher.model import fused_head
from launcher.model.loss import LossFunction, build_loss, summed_loss


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=2, **sizes)).eval()


def batch(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 31, (len(lengths), width), generator=generator)
    mask_BT = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    labels_BT = torch.where(mask_BT & (torch.arange(width)[None] >= 2), ids_BT, -100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}


def test_loss_is_the_naive_sum_when_rows_are_padded() -> None:
    model, rows = tiny(), batch([7, 4, 9], 9)
    loss, count, _ = summed_loss(model, rows)
    logits_BTV = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.detach()
    naive = sum(
        functional.cross_entropy(logits_BTV[b, t - 1].double(), rows["labels"][b, t]).item()
        for b in range(3) for t in range(1, 9) if rows["labels"][b, t] != -100
    )  # fmt: skip
    assert int(count) == (7 - 2) + (4 - 2) + (9 - 2)
    assert abs(loss.item() - naive) < 1e-4


def test_gradient_is_that_of_the_whole_when_the_batch_is_split() -> None:
    whole, rows = tiny(), batch([7, 4, 9], 9)
    summed_loss(whole, rows)[0].backward()
    split = tiny()
    for b in range(3):
        summed_loss(split, {k: v[b : b + 1] for k, v in rows.items()})[0].backward()
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own, in its compiler
@pytest.mark.parametrize("cap", [None, 3.0])
def test_compiled_loss_and_gradient_are_the_plain_ones(cap: float | None) -> None:
    torch.manual_seed(0)
    logits, targets, after = torch.randn(20, 333) * 4, torch.randint(0, 333, (20,)), fused_head.AfterHead(0.5, cap)
    for bias in (None, torch.randn(333)):
        plain, compiled = (
            function(logits.clone(), bias, targets, after, torch.float64, needs_grad=True)
            for function in (fused_head._cross_entropy, fused_head._compiled_cross_entropy())
        )
        for a, b in zip(plain, compiled, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_is_zero_and_present_when_nothing_is_labelled() -> None:
    """A process without samples in a micro-step still takes part in DDP's and ZeRO's collectives."""
    model, rows = tiny(), batch([5], 5)
    rows["labels"][:] = -100
    loss, count, _ = summed_loss(model, rows)
    loss.backward()
    assert loss.item() == 0 and int(count) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------- head and loss in one

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS: dict[str, dict[str, Any]] = {
    "llama": {}, "tied": {"model_type": "llama", "tie_word_embeddings": True}, "phi": {},  # phi's head has a bias
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5}, "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0}, "mamba": {"state_size": 4}, "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True,
        "head_dim": 8,
    },
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    fields = {"model_type": kind, **_SIZES, **_HEADS[kind]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype).eval()


def gradients(model: Any, loss: LossFunction, rows: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = loss(model, rows)
    total = found.loss_sum if found.router_loss is None else found.loss_sum + found.router_loss
    (total * 0.37).backward()
    return found.loss_sum.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, rows: dict[str, torch.Tensor], relative: float, loss_relative: float = 1e-6) -> None:
    """Against whole logits: the loss, and every gradient in units of the largest of its kind."""
    whole, expected = gradients(model, summed_loss, rows)
    loss, notices = build_loss(model, torch.device("cpu"), is_fused=True)
    assert notices == []
    fused, found = gradients(model, loss, rows)
    assert abs(fused - whole) <= loss_relative * abs(whole)
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in found.items():
        assert float((grad - expected[name]).abs().max()) <= relative * scale, name


@pytest.mark.parametrize("kind", _HEADS)
def test_fused_loss_is_that_of_whole_logits_when_a_model_ends_like(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(fused_head._CHUNK_POSITIONS, "cpu", 4)  # several chunks, the last one shorter
    rows = batch([7, 4, 9], 9)
    if kind == "mamba":
        rows.pop("attention_mask")
    assert_same(build(kind), rows, 1e-6)


def test_fused_loss_is_that_of_whole_logits_when_forward_is_bfloat16() -> None:
    model, rows = build("llama", torch.bfloat16), batch([7, 4, 9], 9)
    assert_same(model, rows, 2e-2, loss_relative=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_fused_loss_is_that_of_whole_logits_when_lora_is_on(target: str) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=[target], r=2, init_lora_weights=False)
    adapted = get_peft_model(build("llama"), lora, autocast_adapter_dtype=False)
    assert_same(adapted, batch([7, 4, 9], 9), 1e-6)


def test_gradient_is_zero_and_present_when_nothing_is_labelled_and_head_is_fused() -> None:
    model, rows = build("phi"), batch([5], 5)
    rows["labels"][:] = -100
    loss, _ = build_loss(model, torch.device("cpu"), is_fused=True)
    found = loss(model, rows)
    found.loss_sum.backward()
    assert found.loss_sum.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_logits_stay_whole_when_forward_does_something_else_after_the_head() -> None:
    class Shifted(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + torch.arange(31)
            return outputs

    model, rows = Shifted(tiny().config).eval(), batch([7, 4, 9], 9)
    expected = summed_loss(model, rows).loss_sum.item()
    loss, notices = build_loss(model, torch.device("cpu"), is_fused=True)
    assert len(notices) == 1 and "fused_loss" in notices[0]
    assert loss(model, rows).loss_sum.item() == expected


def test_logits_are_there_as_before_when_no_loss_is_asked_for() -> None:
    model, ids = build("gemma2"), torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    build_loss(model, torch.device("cpu"), is_fused=True)
    assert model(input_ids=ids).logits.equal(before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
