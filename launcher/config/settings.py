"""The settings of a run as typed dataclasses, and everything that can be checked without torch.

`conf/*.yaml` holds the defaults that users see; these classes are the schema. Names and meanings are those of
transformers' TrainingArguments, Accelerate, DeepSpeed and Slurm. Units are in the names or the help texts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from launcher.config.schema import opt

AUTO = "auto"
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
SAVE_STRATEGIES = ("no", "steps", "epoch", "best")
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
LOSS_ON = ("all_assistant_turns", "last_assistant_turn")
DTYPES = ("float32", "bfloat16", "float16")
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@dataclass
class ModelConfig:
    model_name_or_path: str | None = opt(None, "a folder or Hub id to start from")
    config: dict[str, Any] = opt({}, "train from scratch: transformers config with its model_type")
    revision: str | None = opt(None, "branch, tag or commit on the Hub")
    tokenizer_name_or_path: str | None = opt(
        None, "default: the model's own; from scratch: the built-in byte tokenizer"
    )
    eos_token: str | None = opt(None, "a token that ends text and completions; default: the tokenizer's")
    dtype: str = opt("float32", "of forward and of saved weights; masters are always fp32", choices=DTYPES)
    attn_implementation: str = opt("auto", "auto: on a CPU ours where exact, else sdpa, else eager; or one by name")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass")
    trust_remote_code: bool = opt(False, "run code that comes with the model")
    add_tokens: list[Any] = opt([], "new tokens: texts, or {content, special, lstrip, rstrip, single_word, normalized}")
    resize_embeddings: bool = opt(False, "let the embeddings grow to a tokenizer that is larger than they are")
    peft: dict[str, Any] = opt({}, "peft's LoraConfig fields; empty trains every parameter")
    adapter_name_or_path: str | None = opt(
        None, "continue this LoRA adapter: a folder or Hub id; its own r and targets"
    )
    merge_at_end: bool = opt(False, "LoRA: the model in output_dir at the end is the merged one")
    quantization: dict[str, Any] = opt({}, "QLoRA: transformers' BitsAndBytesConfig fields, such as load_in_4bit")

    @property
    def is_adapter(self) -> bool:
        """Whether a LoRA adapter is trained instead of the model's own parameters."""
        return bool(self.peft or self.adapter_name_or_path)


DATA_COLUMNS = (
    "messages", "prompt", "completion", "text", "conversations", "instruction", "input", "output", "system", "history",
    "tools", "chat_template_kwargs",
)  # fmt: skip
"""Names of ours that `data.columns` may give to a column of another name."""


@dataclass
class DataConfig:
    train_files: list[str] = opt([], "JSON Lines, JSON, CSV, Parquet; folders, globs. Formats: docs/data.md")
    eval_files: list[str] = opt([], "same formats")
    dataset_name: str | None = opt(None, "a Hub data set instead of files")
    dataset_config: str | None = opt(None, "its configuration")
    train_split: str = opt("train", "its split to train on")
    eval_split: str | float | None = opt(None, "a split's name, or a fraction of the training rows, seeded")
    sources: list[dict[str, Any]] = opt([], "a mixture: each {train_files | dataset_name, …, weight}")
    generator: dict[str, Any] = opt({}, "a `_target_` that makes rows: (split) -> iterable of rows")
    max_length: int = opt(1024, "tokens; longer rows are cut and counted", minimum=2)
    packing: bool = opt(False, "several rows in one sequence, attention kept apart")
    padding_free: bool = opt(
        True, "rows one after another, no padding: where the attention (flash, ours) keeps them apart"
    )
    completion_only_loss: bool | None = opt(None, "default: true for messages and prompt + completion")
    loss_on: str = opt(
        "all_assistant_turns", "of a conversation; a message's `weight: 0` or `train: false` too", choices=LOSS_ON
    )
    columns: dict[str, str] = opt({}, "own names for ours: data.columns.messages=dialogue")
    chat_template: str | None = opt(None, "a Jinja file or text instead of the tokenizer's own")
    chat_template_date: str | None = opt(
        None, "YYYY-MM-DD, for templates that print the date; default: the day of a run's first start, kept"
    )
    on_bad_row: str = opt("stop", "a row that cannot be used", choices=("stop", "skip"))
    cache_dir: str | None = opt(None, "tokenised data, by content; default ~/.cache/launcher")
    dataset_num_proc: int | None = opt(None, "processes that tokenise; default: all cores of the node", minimum=1)


@dataclass
class TrainConfig:
    max_steps: int = opt(-1, "optimizer steps; wins over num_train_epochs; -1: not set", minimum=-1)
    num_train_epochs: float = opt(1.0, "passes over the training rows", minimum=0)
    train_batch_size: int = opt(32, "samples per optimizer step over all processes", minimum=1)
    per_device_train_batch_size: int | str = opt(
        8, "samples per forward and backward of one process, or auto: as many as fit", minimum=1
    )
    max_grad_norm: float = opt(1.0, "global norm to clip to; 0: no clipping", minimum=0)
    mixed_precision: str | None = opt(None, "default: what model.dtype implies", choices=("no", "bf16", "fp16"))
    logging_steps: int = opt(10, "optimizer steps between lines of metrics.jsonl", minimum=1)
    on_nonfinite: str = opt("stop", "loss or gradient norm NaN or infinite", choices=("stop", "skip"))
    on_spike: str = opt(
        "off", "a loss far above the last ones: leave the step out, or go back to before it",
        choices=("off", "skip", "rollback"),
    )  # fmt: skip
    spike_threshold: float = opt(6.0, "a spike is so many robust deviations (MAD) above the median", minimum=1)
    spike_window: int = opt(50, "of the losses of so many steps; no spike before there are as many", minimum=3)
    spike_rollback_steps: int = opt(5, "steps that a rollback leaves out, the spike the last of them", minimum=1)
    max_spikes: int = opt(5, "within spike_window steps; one more ends the run", minimum=1)
    on_out_of_memory: str = opt(
        "halve", "halve: restart with half the micro-batch, the same samples per step, down to 1, then recompute",
        choices=("halve", "stop"),
    )  # fmt: skip
    early_stopping_patience: int | None = opt(None, "end after so many evaluations without improvement", minimum=1)
    early_stopping_threshold: float = opt(0.0, "what counts as an improvement of the metric", minimum=0)
    fused_loss: bool = opt(True, "head and loss in one, in chunks over labelled positions, where the model allows it")
    torch_compile: bool = opt(False, "compile each layer before the first step (not with strategy=zero3)")
    full_determinism: bool = opt(False, "deterministic CUDA kernels; CPU is always deterministic")

    @property
    def micro_batch_size(self) -> int:
        """per_device_train_batch_size; where it is still open, all of a step."""
        size = self.per_device_train_batch_size
        return size if isinstance(size, int) else self.train_batch_size


@dataclass
class OptimConfig:
    name: str = opt("torch.optim.AdamW", "any torch optimizer class, by import path")
    learning_rate: float = opt(5e-5, "peak", minimum=0)
    weight_decay: float = opt(0.0, "not applied to norms and biases", minimum=0)
    kwargs: dict[str, Any] = opt({}, "further arguments of the optimizer class")


@dataclass
class SchedulerConfig:
    lr_scheduler_type: str = opt("linear", "transformers' schedulers", choices=SCHEDULERS)
    warmup_steps: float = opt(0, "optimizer steps; below 1: a fraction of all steps", minimum=0)
    lr_scheduler_kwargs: dict[str, Any] = opt({}, "further arguments of the scheduler")


@dataclass
class EvalConfig:
    eval_strategy: str = opt("no", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: int = opt(500, "optimizer steps", minimum=1)
    eval_every_s: float | None = opt(None, "also evaluate after so many seconds", minimum=1)
    per_device_eval_batch_size: int = opt(8, "samples", minimum=1)
    metric: dict[str, Any] = opt({}, "a `_target_` that measures by generation; adds its values to the eval line")
    num_sanity_rows: int = opt(4, "of each process; the metric is tried on them at the start; 0: not tried", minimum=0)
    in_background: bool = opt(False, "a process beside the training evaluates the checkpoints; best follows")
    background_device: int | None = opt(None, "with GPUs: the one that it takes, which does not train", minimum=0)


@dataclass
class StrategyConfig:
    name: str = opt(
        AUTO, "how state is spread over processes; auto: the simplest that fits", choices=(*STRATEGIES, AUTO)
    )
    deepspeed: dict[str, Any] = opt({}, "DeepSpeed settings merged over ours")

    @property
    def zero_stage(self) -> int:
        """0 without DeepSpeed."""
        return int(self.name[4]) if self.name.startswith("zero") else 0

    @property
    def is_offloaded(self) -> bool:
        return self.name.endswith("_offload")


@dataclass
class CheckpointConfig:
    save_strategy: str = opt("steps", "when to save", choices=SAVE_STRATEGIES)
    save_steps: int | str = opt(500, "optimizer steps, or auto: from the measured cost of a save (Young/Daly)")
    save_every_s: float | None = opt(None, "also save after so many seconds", minimum=1)
    save_total_limit: int | None = opt(None, "folders in all, best and newest among them; null: no limit")
    save_only_model: bool = opt(False, "weights alone; cannot be resumed")
    load_best_model_at_end: bool = opt(False, "put the best weights into output_dir, else the last")
    metric_for_best_model: str = opt("loss", "an eval metric, with or without the prefix eval_")
    greater_is_better: bool | None = opt(None, "default: false where the name ends in loss, else true")
    resume_from_checkpoint: str = opt("auto", "auto, never, a path, hf://ORG/NAME[@revision]")
    accept_changes: bool = opt(False, "resume although settings that change the result differ")
    async_save: bool = opt(True, "write in the background")
    low_memory: bool | None = opt(None, "save without a copy in host memory, training waits; null: where it is short")
    on_error: str = opt("warn", "a save that fails", choices=("warn", "stop"))
    mtbf_s: float = opt(86400.0, "mean time between failures, for save_steps=auto", minimum=1)
    max_overhead: float = opt(0.01, "share of the time that save_steps=auto may spend saving", minimum=0)

    @property
    def max_unjudged(self) -> int | None:
        """Checkpoints that may wait for an evaluation in the background, which keeps them; with more, training waits.
        None: nothing is deleted, so any number may."""
        return None if self.save_total_limit is None else max(2, self.save_total_limit - 1)

    @property
    def metric_key(self) -> str:
        """The metric as it stands in eval lines: always with eval_."""
        name = self.metric_for_best_model
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def is_greater_better(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric_for_best_model.endswith("loss")


@dataclass
class HubConfig:
    push_to_hub: bool = opt(False, "send checkpoints to the Hub while training")
    hub_model_id: str | None = opt(None, "ORG/NAME; default: the token's user and run_name")
    hub_strategy: str = opt("every_save", "what is sent and when", choices=HUB_STRATEGIES)
    hub_private_repo: bool | None = opt(None, "default: the organisation's")
    hub_revision: str | None = opt(None, "branch; default main")
    bucket: str | None = opt(None, "ORG/NAME of a storage bucket instead of a repository")
    save_total_limit: int | None = opt(None, "checkpoint folders and tags kept there; null: all")
    resume: bool = opt(False, "resume_from_checkpoint=auto looks there where output_dir is empty")
    max_wait_s: float = opt(600.0, "seconds to wait for uploads at the end", minimum=0)
    max_bytes_per_s: float | None = opt(None, "bandwidth cap; null: none", minimum=1)
    max_spool_bytes: int | None = opt(None, "disk held for uploads; null: room for two checkpoints", minimum=1)
    license: str | None = opt(None, "for the model card")
    language: list[str] = opt([], "for the model card")
    tags: list[str] = opt([], "for the model card")


@dataclass
class TrackerConfig:
    name: str | None = opt("tensorboard", "any Accelerate tracker; null: none")
    init_kwargs: dict[str, Any] = opt({}, "passed to the tracker")


@dataclass
class LaunchConfig:
    name: str = opt("local", "here, or what `launcher submit` submits", choices=("local", "slurm"))
    num_processes: int | None = opt(None, "over all machines; default: visible GPUs, or 1", minimum=1)
    num_machines: int = opt(1, "nodes", minimum=1)
    gpus_per_node: int | None = opt(None, "Slurm: GPUs to ask for on each node; 0: CPU", minimum=0)
    machine_rank: int = opt(0, "this node's rank, without Slurm", minimum=0)
    main_process_ip: str | None = opt(None, "the first node, without Slurm")
    main_process_port: int | None = opt(None, "default: a free one", minimum=0)
    hang_timeout_s: float = opt(1800.0, "no step for so long: stacks are written and the run restarts", minimum=1)
    max_restarts: int = opt(3, "restarts after a crash or hang", minimum=0)
    max_requeues: int = opt(100, "Slurm: requeues of one job", minimum=0)
    sbatch: dict[str, Any] = opt({}, "#SBATCH options under their own names")
    setup: list[str] = opt([], "Slurm: shell lines before the run")
    code_files: list[str] = opt([], "Slurm: files to copy beside what git tracks; paths or globs")
    container: str | None = opt(None, "Slurm: srun --container-image")
    env: dict[str, str] = opt({}, "environment variables of the run")


@dataclass
class SweepConfig:
    num_slots: int | None = opt(None, "jobs at once; default: visible GPUs // num_processes", minimum=1)
    wait: bool = opt(True, "Slurm: wait for the jobs")
    retry_failed: bool = opt(False, "run failed jobs again")


_PATHS = {
    "model": ("model_name_or_path", "tokenizer_name_or_path", "adapter_name_or_path"),
    "data": ("dataset_name", "cache_dir"), "checkpoint": ("resume_from_checkpoint",),
}  # fmt: skip


@dataclass
class RunConfig:
    output_dir: str = opt("outputs/run", "everything of the run is in this folder")
    run_name: str = opt("run", "for trackers and the Hub")
    seed: int = opt(42, "data order, initialisation and dropout derive from it", minimum=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        """`~` is the home folder in every path; no library that is handed one on knows that."""
        for group, names in _PATHS.items():
            settings = getattr(self, group)
            for name in names:
                value = getattr(settings, name, None)
                if isinstance(value, str) and value.startswith("~"):
                    setattr(settings, name, str(Path(value).expanduser()))
        for source in self.data.sources:
            if isinstance(source, dict) and str(source.get("dataset_name", "")).startswith("~"):
                source["dataset_name"] = str(Path(source["dataset_name"]).expanduser())

    @property
    def mixed_precision(self) -> str:
        """`no`, `bf16` or `fp16`: what model.dtype implies unless it is set."""
        return self.train.mixed_precision or MIXED_PRECISION[self.model.dtype]


def run_length(config: RunConfig) -> list[float]:
    """What decides the number of steps, beside the data: by it a finished run knows that it was asked for more."""
    return [config.train.max_steps, config.train.num_train_epochs, config.train.train_batch_size]


def to_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def expanded(name: str) -> str:
    """A folder's name with its `~` replaced; a Hub id as it is."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def is_local_path(name: str) -> bool:
    """Whether a model or data name means a folder here rather than a Hub id."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).is_dir() or name.count("/") > 1


def is_day(text: str) -> bool:
    """Whether this is a date as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


DATA_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|csv|parquet)(\.gz|\.zst)?$", re.I)


def _expand(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(p for p in path.rglob("*") if DATA_SUFFIX.search(p.name) and _is_meant(p, path))
    elif any(c in name for c in "*?["):
        first = next(i for i, part in enumerate(path.parts) if any(c in part for c in "*?["))
        base, pattern = Path(*path.parts[:first]), path.parts[first:]
        are_hidden_meant = any(part.startswith(".") for part in pattern)
        found = base.glob(str(Path(*pattern)))
        yield from sorted(p for p in found if p.is_file() and (are_hidden_meant or _is_meant(p, base)))


def _is_meant(path: Path, base: Path) -> bool:
    """A file that is not hidden: as in a shell, editors' copies and what macOS leaves beside files are no data."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(base).parts)


def no_files_text(name: str) -> str:
    """What is wrong with a name for which `expand_files` finds nothing."""
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{name} is a folder without a .jsonl, .ndjson, .json, .csv or .parquet file (.gz, .zst)"
    return f"{name} is no file" if path.exists() else f"{name} does not exist (looked in {Path.cwd()})"


def expand_files(names: list[str]) -> list[Path]:
    """The files that `data.train_files` or `data.eval_files` name; what a folder holds and globs are sorted.

    Hidden files and folders count where they are named, not where a folder or a glob finds them.
    """
    return [path for name in names for path in _expand(name)]
