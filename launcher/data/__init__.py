"""Formats and chat templates, the token cache, packing, and the resumable sampler."""

from launcher.data.build import Data, build_data
from launcher.data.evaluation import EvalContext
from launcher.data.rows import TokenRows, collate, to_device
from launcher.data.sampler import SORTED, StepSampler, split_step
from launcher.data.tokenising_display import TokenisingDisplay
from launcher.data.tokenizer import build_tokenizer, build_vocabulary

__all__ = [
    "SORTED", "Data", "EvalContext", "StepSampler", "TokenRows", "TokenisingDisplay", "build_data", "build_tokenizer",
    "build_vocabulary", "collate",
    "split_step", "to_device",
]  # fmt: skip
