"""The loss that is trained on: summed over labelled positions only, exact however rows are padded and split."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.model.build import summed_loss


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


def test_gradient_is_zero_and_present_when_nothing_is_labelled() -> None:
    """A process without samples in a micro-step still takes part in DDP's and ZeRO's collectives."""
    model, rows = tiny(), batch([5], 5)
    rows["labels"][:] = -100
    loss, count, _ = summed_loss(model, rows)
    loss.backward()
    assert loss.item() == 0 and int(count) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
