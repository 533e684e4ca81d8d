"""Builds all parts of a run, in the order in which they need each other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.agent import out_of_memory
from launcher.base import _deepspeed, files
from launcher.base.errors import ResumeMismatchError, UserError
from launcher.base.freed_memory import keep_freed_memory
from launcher.base.lock import RunLock
from launcher.base.paths import RunPaths
from launcher.base.process import host
from launcher.base.processes import Processes
from launcher.base.shared_folder import check_shared
from launcher.base.timeline import Timeline
from launcher.checkpoint import resume
from launcher.checkpoint.engine import Checkpointer
from launcher.checkpoint.resume import ResumePoint
from launcher.checkpoint.retention import sweep_leftovers
from launcher.config.settings import RunConfig, run_length
from launcher.data import SORTED, StepSampler, build_vocabulary, template_date
from launcher.hub import NoHub, build_hub
from launcher.model.attention import settle_attention, unwrapped
from launcher.model.build import build_model, static_files
from launcher.model.compile import compile_layers
from launcher.model.cpu_products import align_weights, use_fast_products
from launcher.model.identity import agreed_identity
from launcher.model.loss import build_loss, takes_padding
from launcher.model.optim import Schedule, build_optimizer
from launcher.model.positions import check_positions
from launcher.model.processor import processor_files
from launcher.model.quantization import try_quantised
from launcher.model.stop_tokens import end_generation_with
from launcher.saving.interop.importing import import_notices
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.saving.training_state import TrainingState
from launcher.train import sizing
from launcher.train.about import about_run, summary
from launcher.train.accelerator import LauncherAccelerator
from launcher.train.background import Background
from launcher.train.display import build_display
from launcher.train.early_stop import EarlyStop
from launcher.train.evaluation import Evaluator
from launcher.train.evaluator_process import EvaluatorProcess
from launcher.train.loop import Run
from launcher.train.metrics import MetricsFile, RunFile, SamplesFile
from launcher.train.recorder import MainRecorder, NoRecorder, Recorder, note_undone
from launcher.train.rehearsal import try_optimizer
from launcher.train.resume_point import find_resume_point
from launcher.train.run_settings import DAY, of_one_day, write_settings
from launcher.train.spikes import ROLLBACKS, Spikes, idle_settings, known_rollbacks
from launcher.train.step import TrainStep
from launcher.train.trackers import Trackers
from launcher.train.watchdog import Watchdog

_LENGTH = "steps in all (train.max_steps, or train.num_train_epochs)"


def open_output_dir(config: RunConfig, processes: Processes) -> tuple[RunPaths, RunLock]:
    """Creates output_dir, takes its lock, removes what a crash left behind. Collective.

    Raises:
        UserError: it cannot be written, or the processes do not share it. RunLockedError: another run is alive in it.
    """
    paths = RunPaths(Path(config.output_dir).expanduser().resolve())
    lock = RunLock(paths.lock)
    pids = [pid for where, pid in processes.gather((host(), os.getpid())) if where == host()]

    def open_it() -> None:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            paths.refuse_links()
            files.make_dirs(paths.logs_dir, within=paths.root, mode=0o700)
            files.fsync_path(paths.root)  # else a power cut takes the folder with all its durable checkpoints
            lock.acquire(pids, lambda text: print(f"launcher: {text}", file=sys.stderr, flush=True))
            sweep_leftovers(paths)
        except OSError as error:
            raise UserError(f"output_dir={config.output_dir} cannot be written: {error}") from error

    processes.on_main(open_it)
    try:
        check_shared(paths.root, processes)
    except UserError:
        lock.release()
        raise
    return paths, lock


def result_settings(config: RunConfig, fingerprint: str, processes: Processes) -> dict[str, Any]:
    """What decides the result of a run; compared at a resume. Collective."""
    name, deepspeed = config.model.model_name_or_path, dict(config.strategy.deepspeed)
    adapter = config.model.adapter_name_or_path
    return {
        "seed": config.seed,
        "data": fingerprint,
        "train.train_batch_size": config.train.train_batch_size,
        "train.max_grad_norm": config.train.max_grad_norm,
        "train.mixed_precision": config.mixed_precision,
        "train.on_nonfinite": config.train.on_nonfinite,
        "train.on_spike": config.train.on_spike,
        "train.spike_threshold": config.train.spike_threshold,
        "train.spike_window": config.train.spike_window,
        "train.spike_rollback_steps": config.train.spike_rollback_steps,
        "train.fused_loss": config.train.fused_loss,
        "train.torch_compile": config.train.torch_compile,
        "model.model_name_or_path": Path(name).name if name else None,
        "model.revision": config.model.revision,
        "model.base": agreed_identity(config, processes),
        "model.config": config.model.config,
        "model.dtype": config.model.dtype,
        "model.add_tokens": config.model.add_tokens,
        "model.peft": config.model.peft,
        "model.adapter_name_or_path": Path(adapter).name if adapter else None,
        "model.quantization": config.model.quantization,
        "optim.name": config.optim.name,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.kwargs": config.optim.kwargs,
        "scheduler.lr_scheduler_type": config.scheduler.lr_scheduler_type,
        "scheduler.warmup_steps": config.scheduler.warmup_steps,
        "scheduler.lr_scheduler_kwargs": config.scheduler.lr_scheduler_kwargs,
        "strategy": config.strategy.name,
        "strategy.deepspeed.zero_optimization": deepspeed.pop("zero_optimization", {}),
        "strategy.deepspeed": deepspeed,
        "num_processes": processes.world_size,
        "per_device_train_batch_size": config.train.per_device_train_batch_size,
    }


def build_run(
    config: RunConfig, accelerator: LauncherAccelerator, processes: Processes, paths: RunPaths, lock: RunLock,
    early: EarlyStop, asked: Mapping[str, Any],
) -> Run:  # fmt: skip
    """Data, model, optimizer, state; resumed where there is something to resume from. Collective.

    Args:
        asked: the settings before `auto` and limits of memory were settled, see `agent.out_of_memory`.
    """
    processes.on_main(lambda: None if paths.config.exists() else write_settings(config, paths))
    stop = early.stop
    point, notices = find_resume_point(config, paths, processes)
    tell(processes, "reading the data")
    vocabulary = build_vocabulary(config)
    tokenizer = vocabulary.tokenizer
    config = of_one_day(config, tokenizer, point, paths, processes)
    data = early.build_data(config, tokenizer)
    # A checkpoint that says nothing about it is of a version that knew one order only.
    order = point.state["settings"].get("data.order", SORTED) if point is not None else None
    sampler = StepSampler(len(data.train), config.train.train_batch_size, config.seed, order)
    total_steps = (
        config.train.max_steps if config.train.max_steps >= 0 else sampler.total_steps(config.train.num_train_epochs)
    )
    if sampler.num_rows < config.train.train_batch_size:
        notices = [*notices, (
            f"a step takes train.train_batch_size={config.train.train_batch_size} samples but there are only "
            f"{sampler.num_rows}: every step trains on each of them about "
            f"{config.train.train_batch_size / sampler.num_rows:.3g} times, and {total_steps} steps are "
            f"{sampler.epoch_after(total_steps):.3g} epochs"
        )]  # fmt: skip
    known = point.state["settings"].get("data") if point is not None else None
    settings = result_settings(config, data.fingerprints.like(known), processes)
    settings |= {"data.order": sampler.order, DAY: template_date(config.data, tokenizer)}
    if accelerator.device.type == "cpu":  # sums of large tensors are split by it
        settings["num_threads"] = torch.get_num_threads()
    if point is not None:
        notices = notices + compared(config, point, settings, total_steps)
    tell(processes, "building the model")
    if accelerator.device.type == "cpu" and not config.strategy.zero_stage:  # DeepSpeed's buffers leave gaps: half more
        keep_freed_memory()
    resumed_from = point.folder if point is not None else None
    built = build_model(config, tokenizer, new_token_ids=vocabulary.new_token_ids, resumed_from=resumed_from)
    end_generation_with(built.module, data.end_token_ids)
    notices += check_positions(
        built.module, built.config, data.longest, data.longest_place, is_packed=config.data.packing,
        micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    notices = [*notices, *vocabulary.notices(), *built.notices]
    late: dict[str, Any] = {"model.attn_implementation": built.attn_implementation}
    if settings["model.base"] is None and config.model.model_name_or_path:  # downloaded only now, or not needed
        late["model.base"] = agreed_identity(config, processes)
    notices += compared_late(config, point, settings, late)
    processes.on_main(lambda: write_settings(config, paths))  # not those of a start that was just refused
    statics: dict[str, bytes] = {}
    if processes.is_main:
        statics = static_files(built, tokenizer) | processor_files(config, built.config, resumed_from)
    optimizer = build_optimizer(config, built.module)
    notices += try_optimizer(config, optimizer, accelerator.device)
    schedule = Schedule(config, optimizer, total_steps)
    use_fast_products(built.module, accelerator.device)
    align_weights(built.module, accelerator.device, only_trained=config.model.is_adapter)
    model, optimizer = accelerator.prepare(built.module, optimizer)
    state = TrainingState(
        config, paths, processes, model, optimizer, schedule, accelerator.scaler, total_steps, built.stored
    )
    _deepspeed.forget_powers(state.trained.optimizer)
    if built.first_weights is not None:
        state.take_first_masters(built.first_weights, built.new_rows)
    state.settings = settings
    state.origin = point.state.get("origin") if point is not None else None
    watchdog = Watchdog(paths.stacks(processes.rank), config.launch.hang_timeout_s)
    checkpointer = Checkpointer(
        processes, lambda: state.plan(config.checkpoint.save_only_model), statics,
        zero_stage=config.strategy.zero_stage, is_async=config.checkpoint.async_save, device=accelerator.device,
        hang_timeout_s=config.launch.hang_timeout_s, fence=lock.fence() if processes.is_main else None,
        low_memory=config.checkpoint.low_memory, alive=watchdog.alive,
    )  # fmt: skip
    accelerator.attach(state, checkpointer)
    if point is not None:
        accelerator.load_state(str(point.folder))
        notices += import_notices(
            point.state, learning_rate=schedule.learning_rate, total_steps=total_steps,
            epoch=sampler.epoch_after(point.step), accept=config.checkpoint.accept_changes,
        )  # fmt: skip
        notices = [f"continuing from {point.folder} at step {point.step} of {total_steps}", *notices]
    try_quantised(config, model, accelerator, len(tokenizer))
    attention = settle_attention(
        config, model, accelerator, len(tokenizer), built.attn_implementation,
        known=point.state["settings"].get("attention") if point is not None else None, longest_row=data.longest,
    )  # fmt: skip
    notices += compared_late(config, point, settings, {"attention": attention.setting()})
    data.use_flat_batches(attention.is_flat, is_rounded=takes_padding(model, accelerator.device))
    loss, loss_notices = build_loss(
        unwrapped(accelerator.unwrap_model(model)), accelerator.device, is_fused=config.train.fused_loss,
        is_compiled=config.train.torch_compile and accelerator.device.type == "cuda",
    )  # fmt: skip
    if config.train.torch_compile:
        tell(processes, "compiling the layers of the model")
        loss_notices.append(compile_layers(config, model, accelerator, is_flat=attention.is_flat))
    about = about_run(
        built.module, num_rows=len(data.train), num_eval_rows=len(data.eval) if data.eval is not None else None,
        device=accelerator.device,
    ) | {"num_processes": processes.world_size}  # fmt: skip
    rollbacks = processes.on_main(lambda: known_rollbacks(paths, point))
    recorder = build_recorder(config, accelerator, processes, paths, state, total_steps, about, rollbacks)
    can_recompute = bool(getattr(built.module, "supports_gradient_checkpointing", False))
    sizes = sizing.sizes_in_use(config, processes.world_size, can_recompute=can_recompute)
    recorder.update_run(**{out_of_memory.IN_USE: out_of_memory.in_use(sizes, asked)})
    hub = build_hub(config, paths) if processes.is_main else NoHub()
    evaluator = Evaluator(
        config, processes, accelerator, model, tokenizer, data, loss, watchdog, total_steps=total_steps
    )  # fmt: skip
    saver = Saver(
        config, paths, processes, state, checkpointer, accelerator.save_state, lock=lock,
        schedule=SaveSchedule(config, len(data.train)), outlet=recorder, hub=hub, alive=watchdog.alive,
        is_stopping=lambda: stop.reason_code(0.0, 0.0) > 0,
        is_judged_later=lambda step: config.eval.in_background and evaluator.is_due(step), total_steps=total_steps,
        saved_step=point.step if point is not None and point.folder.parent == paths.root else 0,
    )  # fmt: skip
    train_step = TrainStep(
        config, processes, accelerator, model, optimizer, schedule, data.train, sampler, tokenizer.pad_token_id,
        loss, before_update=checkpointer.finish_snapshot,
    )  # fmt: skip
    background = Background(
        config, paths, processes, state, saver, recorder, stop, evaluator.is_due, sampler.epoch_after,
        EvaluatorProcess(config, paths), watchdog.alive,
    )  # fmt: skip
    spikes = Spikes(config.train, paths, processes, state, saver, recorder, accelerator.load_state, rollbacks)
    for text in summary(config, about, epochs=sampler.epoch_after(total_steps), total_steps=total_steps):
        recorder.say(text)
    for notice in [*notices, *data.notices, *loss_notices]:
        recorder.say(notice)
    return Run(
        config=config, processes=processes, state=state, train_step=train_step, evaluator=evaluator, saver=saver,
        recorder=recorder, hub=hub, stop=stop, watchdog=watchdog, spikes=spikes,
        background=background, total_steps=total_steps,
    )  # fmt: skip


def tell(processes: Processes, text: str) -> None:
    """What takes the time before the first step; nobody shows anything yet."""
    if processes.is_main:
        print(f"launcher: {text}", file=sys.stderr, flush=True)


def compared(config: RunConfig, point: ResumePoint, settings: dict[str, Any], total_steps: int) -> list[str]:
    """What differs from the checkpoint's settings, as notices.

    Raises:
        ResumeMismatchError: what differs would change the result, and `checkpoint.accept_changes` is not set.
    """
    saved, now = point.state["settings"], json.loads(json.dumps(settings))
    now = {key: now[key] for key in now if key in saved}  # another tool, or an older version, records only some of them
    # A model is what it is, not what it is called; the name stands in for it where one of the two does not know it.
    is_known = None not in (saved.get("model.base"), now.get("model.base"))
    left_out = ["model.model_name_or_path", "model.revision"] if is_known else ["model.base"]
    left_out += ["model.attn_implementation", "attention"]  # known, and compared, once the model is built
    left_out += idle_settings(saved, now)
    saved, now = ({k: v for k, v in settings.items() if k not in left_out} for settings in (saved, now))
    before = point.state["total_steps"]
    if total_steps < before and "imported" not in point.state:  # another tool's schedule is looked at elsewhere
        saved, now = {**saved, _LENGTH: before}, {**now, _LENGTH: total_steps}
    if config.checkpoint.accept_changes:
        _check_architecture(config, point)
    notices = resume.compare_settings(saved, now, accept=config.checkpoint.accept_changes)
    if before != total_steps:
        notices.append(f"{before} steps became {total_steps}: the learning-rate schedule is recomputed")
    return notices


def _check_architecture(config: RunConfig, point: ResumePoint) -> None:
    """A resumed model is built as its checkpoint says: other sizes that were accepted would be left out in silence.

    Raises:
        ResumeMismatchError: `model.config` asks for another model.
    """
    built = files.read_json_or(point.folder / "config.json", {})
    wrong = [
        f"model.config.{key}: {built[key]!r} in the checkpoint, {value!r} now"
        for key, value in (config.model.config or {}).items()
        if isinstance(value, int | float | str) and isinstance(built, dict) and key in built and built[key] != value
    ]
    if wrong:
        raise ResumeMismatchError(
            f"{point.folder} holds another model, which checkpoint.accept_changes=true cannot change:\n  "
            + "\n  ".join(wrong)
            + "\nTo train the new one: output_dir=ANOTHER_FOLDER, or checkpoint.resume_from_checkpoint=never"
        )


def compared_late(
    config: RunConfig, point: ResumePoint | None, settings: dict[str, Any], late: dict[str, Any]
) -> list[str]:
    """Adds settings that are known only once the model is built, and compares them likewise."""
    saved = point.state["settings"] if point is not None else {}
    found = {key: saved.get(key) if value is None else value for key, value in late.items()}
    settings |= found
    known = [key for key in found if saved.get(key) is not None]
    return resume.compare_settings(
        {key: saved[key] for key in known}, {key: found[key] for key in known}, accept=config.checkpoint.accept_changes
    )


def build_recorder(
    config: RunConfig, accelerator: LauncherAccelerator, processes: Processes, paths: RunPaths, state: TrainingState,
    total_steps: int, about: dict[str, Any], rollbacks: list[dict[str, Any]],
) -> Recorder:  # fmt: skip
    """What writes down and shows the run: on the main process, nothing on the others."""
    if not processes.is_main:
        return NoRecorder()
    metrics, run_file = MetricsFile(paths.metrics), RunFile(paths, processes.world_size)
    timeline = Timeline(paths)
    note_undone(timeline, metrics.trim(state.step))
    run_file.update(
        step=state.step, epoch=state.progress.epoch, total_steps=total_steps, length=run_length(config),
        resumed_from=config.checkpoint.resume_from_checkpoint, about=about,
        **({ROLLBACKS: rollbacks} if rollbacks else {}),
    )  # fmt: skip
    trackers = Trackers(accelerator, config, paths, state.step)
    timeline.append("begin", step=state.step, total_steps=total_steps)
    checkpoint = config.checkpoint
    display = build_display(
        total_steps, state.step, checkpoint.metric_key, is_greater_better=checkpoint.is_greater_better
    )
    return MainRecorder(metrics, run_file, trackers, display, timeline, SamplesFile(paths), about)
