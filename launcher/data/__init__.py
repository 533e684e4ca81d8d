"""Formats and chat templates, the token cache, packing, and the resumable sampler."""

from launcher.data.build import Data, build_data
from launcher.data.evaluation import EvalContext
from launcher.data.rows import TokenRows, collate, to_device
from launcher.data.sampler import SORTED, StepSampler, split_step
from launcher.data.template_date import stop_clock, template_date, with_template_date
from launcher.data.tokenising_display import TokenisingDisplay
from launcher.data.tokenizer import build_tokenizer, build_vocabulary

__all__ = [
    "SORTED", "Data", "EvalContext", "StepSampler", "TokenRows", "TokenisingDisplay", "build_data", "build_tokenizer",
    "build_vocabulary", "collate",
    "split_step", "stop_clock", "template_date", "to_device", "with_template_date",
]  # fmt: skip
