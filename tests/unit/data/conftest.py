"""Tokenizers and rows small enough to write the expected tokens down by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.settings import DataConfig, RunConfig
from launcher.data import Data, build_data
from launcher.data.tokenizer import byte_tokenizer

# Every turn on one line, the same wherever it stands; no generation tags.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen3's and R1's: the reasoning of earlier answers is dropped once another turn follows.
REWRITING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def word_tokenizer() -> Any:
    """Splits at spaces, adds <s> by itself, has no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "red", "green", "blue", "is", "sky"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes JSON Lines; a row that is text already is written as it is."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_data(tmp_path: Path, tokenizer: Any) -> Callable[..., Data]:
    """build_data with these `data` settings, on one process, with a cache of the test's own."""

    def make(seed: int = 1, tokenizer: Any = tokenizer, **settings: Any) -> Data:
        config = RunConfig(seed=seed, data=DataConfig(**{"cache_dir": str(tmp_path / "cache"), **settings}))
        return build_data(config, tokenizer, is_builder=True, wait=lambda: None)

    return make


def chat(*contents: str) -> dict[str, Any]:
    """A conversation of user and assistant by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}
