"""Evaluates checkpoints of a run beside its training: `python -m launcher.train.evaluate_checkpoint OUTPUT_DIR`.

Reads steps from stdin, a line each; what it finds of checkpoint-N is in evaluations/checkpoint-N.json, durable, when
{"step": N} is answered on stdout. After {"step": N, "error": "…"} the process ends. It is at the lowest priority, the
first one that the kernel ends where memory is short, and dies with the process that started it.

The number is the foreground evaluation's: same rows in the same batches, same metric. Where `model.dtype` is not
float32 the weights are those of model.safetensors, rounded to it, as every reader of the checkpoint gets them, while
training under single and ddp evaluates its fp32 masters under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.base import evaluations, manifest
from launcher.base.collector import no_collections
from launcher.base.errors import DamagedCheckpointError
from launcher.base.evaluations import Evaluation
from launcher.base.files import read_json_or
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.base.rank_reports import where_raised
from launcher.base.secrets import redacted
from launcher.config.compose import compose_arguments
from launcher.config.settings import RunConfig
from launcher.train import rank_setup

_NICE = 19
_MAX_SAMPLES = 8


def main() -> None:
    rank_setup.before_imports()
    _stand_back()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    paths = RunPaths(Path(sys.argv[1]))
    evaluate: Callable[[int], Evaluation] | None = None
    for line in sys.stdin:
        step = int(line)
        answer: dict[str, Any] = {"step": step}
        try:
            evaluate = evaluate or build(alone(compose_arguments(["--config-file", str(paths.config)])), paths, step)
            evaluations.write(paths, evaluate(step))
        except BaseException as error:
            print(redacted(traceback.format_exc()), file=sys.stderr)
            where, is_users_code = where_raised(error)
            answer["error"] = redacted(f"{type(error).__name__}: {error}")[:500] + (
                f" ({where})" if is_users_code else ""
            )
        print(f"\n{json.dumps(answer)}", file=answers, flush=True)  # whatever start-up code has printed ends there
        if "error" in answer:
            break
    sys.stderr.flush()
    os._exit(0)


def _stand_back() -> None:
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def alone(config: RunConfig) -> RunConfig:
    """The settings for one process that trains nothing."""
    return dataclasses.replace(
        config,
        strategy=dataclasses.replace(config.strategy, name="single", deepspeed={}),
        model=dataclasses.replace(config.model, gradient_checkpointing=False),
        train=dataclasses.replace(config.train, torch_compile=False),
    )


def build(config: RunConfig, paths: RunPaths, step: int) -> Callable[[int], Evaluation]:
    """The model as training builds it, without an optimizer, and what evaluates the checkpoint of a step with it."""
    with no_collections():
        import time

        import torch

        from launcher.base.processes import Processes
        from launcher.checkpoint.load import load_weights
        from launcher.data import build_data, build_vocabulary, stop_clock, template_date
        from launcher.model.attention import settle_attention, unwrapped
        from launcher.model.build import build_model, weights_stem
        from launcher.model.cpu_products import use_fast_products
        from launcher.model.loss import build_loss, takes_padding
        from launcher.model.stop_tokens import end_generation_with
        from launcher.train.accelerator import build_accelerator
        from launcher.train.evaluation import Evaluator
        from launcher.train.watchdog import Watchdog

    accelerator, processes = build_accelerator(config), Processes()
    vocabulary = build_vocabulary(config)
    tokenizer = vocabulary.tokenizer
    if day := template_date(config.data, tokenizer):  # config.yaml holds the run's
        stop_clock(tokenizer, day)
    data = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
    first = paths.checkpoint_dir(step)
    refuse_damaged(first)
    built = build_model(config, tokenizer, new_token_ids=vocabulary.new_token_ids, resumed_from=first)
    end_generation_with(built.module, data.end_token_ids)
    use_fast_products(built.module, accelerator.device)
    model = accelerator.prepare(built.module)

    def load(folder: Path) -> None:
        load_weights(
            built.module, folder, weights_stem=weights_stem(config), stored=built.stored,
            listed=manifest.read(folder).paths,
        )  # fmt: skip

    load(first)  # what follows tries the model out
    settings = read_json_or(CheckpointPaths(first).run_state, {}).get("settings") or {}
    attention = settle_attention(
        config, model, accelerator, len(tokenizer), built.attn_implementation, known=settings.get("attention")
    )
    data.use_flat_batches(attention.is_flat, is_rounded=takes_padding(model, accelerator.device))
    loss, _ = build_loss(
        unwrapped(accelerator.unwrap_model(model)), accelerator.device, is_fused=config.train.fused_loss,
        is_compiled=False,
    )  # fmt: skip
    watchdog = Watchdog(paths.evaluation_stacks, config.launch.hang_timeout_s)
    evaluator = Evaluator(config, processes, accelerator, model, tokenizer, data, loss, watchdog, total_steps=0)

    def evaluate(step: int) -> Evaluation:
        started, folder = time.monotonic(), paths.checkpoint_dir(step)
        identity = evaluations.checkpoint_id(folder)
        refuse_damaged(folder)
        load(folder)
        torch.manual_seed(config.seed)
        values = evaluator.evaluate()
        watchdog.pause()
        if identity is None or identity != evaluations.checkpoint_id(folder):
            raise DamagedCheckpointError(f"{folder.name} is another one now")
        spent_s = round(time.monotonic() - started, 3)
        return Evaluation(step, identity, values, spent_s, evaluator.samples[:_MAX_SAMPLES])

    return evaluate


def refuse_damaged(folder: Path) -> None:
    """Raises: DamagedCheckpointError: its bytes are not those of its manifest."""
    if problems := manifest.verify(folder):
        raise DamagedCheckpointError(f"{folder.name} is damaged: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
