"""The rules of evaluation in the background: it needs a checkpoint at each step that is due; no step waits for it."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.data_rules import evaluating
from launcher.config.settings import RunConfig

_OFF = "or eval.in_background=false"


def background_problems(config: RunConfig) -> Iterator[str]:
    ev = config.eval
    if not ev.in_background:
        if ev.background_device is not None:
            yield (
                f"eval.background_device={ev.background_device} is for evaluation in the background but "
                "eval.in_background=false. Set eval.in_background=true, or eval.background_device=null"
            )
        return
    if ev.eval_strategy == "no":
        yield (
            "eval.in_background=true evaluates checkpoints but eval.eval_strategy=no. "
            f"Set {evaluating(config.data)}, {_OFF}"
        )
        return
    yield from _unsaved(config)
    yield from _waited_for(config)
    if config.hub.push_to_hub and config.hub.save_total_limit is not None:
        yield (
            f"hub.save_total_limit={config.hub.save_total_limit} deletes checkpoints on the Hub, which does not know "
            f"yet which one is the best: eval.in_background=true. Set hub.save_total_limit=null, {_OFF}"
        )


def _unsaved(config: RunConfig) -> Iterator[str]:
    """Evaluations that are due at steps at which nothing is saved."""
    ev, ck = config.eval, config.checkpoint
    every = f"checkpoint.save_strategy={ev.eval_strategy}"
    if ev.eval_every_s is not None:
        yield (
            f"eval.eval_every_s={ev.eval_every_s:g} evaluates at steps that are not saved, and eval.in_background=true "
            f"evaluates checkpoints. Set eval.eval_every_s=null, {_OFF}"
        )
    if ck.save_strategy == "no":
        yield (
            "eval.in_background=true evaluates checkpoints but checkpoint.save_strategy=no. "
            f"Set checkpoint=recommended, {_OFF}"
        )
    elif ck.save_strategy == "best":
        yield (
            "checkpoint.save_strategy=best saves what was evaluated, and eval.in_background=true evaluates what was "
            f"saved. Set {every} checkpoint.load_best_model_at_end=true, {_OFF}"
        )
    elif ck.save_strategy != ev.eval_strategy:
        yield (
            f"eval.in_background=true evaluates checkpoints: with eval.eval_strategy={ev.eval_strategy} they are saved "
            f"at other steps by checkpoint.save_strategy={ck.save_strategy}. Set {every}, {_OFF}"
        )
    elif ev.eval_strategy == "steps" and (not isinstance(ck.save_steps, int) or ev.eval_steps % ck.save_steps):
        yield (
            f"eval.in_background=true evaluates checkpoints: eval.eval_steps={ev.eval_steps} must be a multiple of "
            f"checkpoint.save_steps (got {ck.save_steps}). Set checkpoint.save_steps={ev.eval_steps}, {_OFF}"
        )


def _waited_for(config: RunConfig) -> Iterator[str]:
    """What decides on the training itself cannot come later."""
    if config.train.early_stopping_patience is not None:
        yield (
            f"train.early_stopping_patience={config.train.early_stopping_patience} ends the training by evaluations, "
            "which come later, at no certain step, with eval.in_background=true. Set "
            f"train.early_stopping_patience=null, {_OFF}"
        )
    if config.scheduler.lr_scheduler_type == "reduce_lr_on_plateau":
        yield (
            "scheduler.lr_scheduler_type=reduce_lr_on_plateau follows evaluations, which come later, at no certain "
            f"step, with eval.in_background=true. Set scheduler=cosine, {_OFF}"
        )
