"""Parts of your own. Settings name them by their import path, as eval.metric._target_=mine.Contains."""

from collections.abc import Iterator
from typing import Any

import torch

from launcher.data.evaluation import EvalContext


class Contains:
    """A metric: the share of held-out answers that the model's own answer contains. Its value joins the eval line."""

    def __call__(self, context: EvalContext) -> dict[str, float]:
        own, right = context.rows[context.rank :: context.world_size], 0
        for row in own:
            *prompt, answer = row["messages"]
            ids = context.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens = context.model.generate(**ids.to(context.device), max_new_tokens=16, do_sample=False)
            right += answer["content"] in context.tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :])
        total, count = context.sum_over_processes([float(right), float(len(own))])
        return {"contains": total / count}


class SignSGD(torch.optim.Optimizer):
    """An optimizer: steps by the sign of the gradient. Any torch optimizer works, one of your own too."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                        parameter.grad.sign(), alpha=group["lr"]
                    )


class Squares:
    """Data without files: called with "train" or "eval", yields rows. The same rows at every call."""

    def __call__(self, split: str) -> Iterator[dict[str, Any]]:
        for number in range(0, 100) if split == "train" else range(100, 110):
            question = {"role": "user", "content": f"{number} squared?"}
            yield {"messages": [question, {"role": "assistant", "content": str(number * number)}]}
