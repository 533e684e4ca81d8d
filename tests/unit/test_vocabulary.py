"""New tokens: the tokenizer and the embeddings grow, the new rows are the mean of the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.data.tokenizer import build_vocabulary, byte_tokenizer, tokenizer_key
from launcher.model.build import BuiltModel, build_model, static_files
from tests.unit.test_build_model import make_base

TOKENS = 'model.add_tokens=["<tool>",{content: "<end>", special: true},"<think>"]'


def config_of(base: Path, *more: str) -> RunConfig:
    return compose(
        ["model=pretrained", f"model.model_name_or_path={base}", "data=arithmetic", "strategy=single", *more]
    )


def built(base: Path, *more: str) -> BuiltModel:
    config = config_of(base, *more)
    vocabulary = build_vocabulary(config)
    return build_model(config, vocabulary.tokenizer, new_token_ids=vocabulary.new_token_ids)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied and a tied head; 264 rows for 264 tokens."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, name) for name in ("llama", "llama_tied", "gpt2")}


def test_tokens_are_added_as_transformers_would_and_known_ones_are_said(bases: dict[str, Path], tmp_path: Path) -> None:
    vocabulary = build_vocabulary(config_of(bases["llama"], TOKENS))
    tokenizer = vocabulary.tokenizer
    assert vocabulary.new_token_ids == (264, 265) and vocabulary.known_tokens == ("<think>",)
    assert vocabulary.notices() == ["model.add_tokens: <think> is in the tokenizer already"]
    assert tokenizer.encode("a<tool>b<end>") == [97, 264, 98, 265]
    assert tokenizer.decode([97, 264, 265], skip_special_tokens=True) == "a<tool>"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.encode("a<tool>b<end>") == [97, 264, 98, 265]
    assert again.added_tokens_decoder[265].special and not again.added_tokens_decoder[264].special


def test_cache_of_tokens_depends_on_them(bases: dict[str, Path]) -> None:
    keys = [tokenizer_key(build_vocabulary(config_of(bases["llama"], *more)).tokenizer) for more in ((), (TOKENS,))]
    assert len(set(keys)) == 2


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_new_rows_are_the_mean_that_transformers_draws_them_around(bases: dict[str, Path], name: str) -> None:
    found: Any = built(bases[name], TOKENS).module
    theirs = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    theirs.resize_token_embeddings(266)
    assert found.config.vocab_size == 266
    for ours, other in ((m.get_input_embeddings(), m2) for m, m2 in [(found, theirs.get_input_embeddings())]):
        torch.testing.assert_close(ours.weight, other.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.lm_head.weight, theirs.lm_head.weight, atol=1e-5, rtol=0)
    assert found.lm_head.weight[264].equal(found.lm_head.weight[:264].double().mean(0).float())
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == (name != "llama")


def test_a_spare_row_gets_the_mean_too_and_nothing_else_changes(tmp_path: Path) -> None:
    base = make_base(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(272)
    model.save_pretrained(base)
    found: Any = built(base, TOKENS).module
    rows = found.model.embed_tokens.weight
    assert rows.shape[0] == 272 and rows[265].equal(rows[:264].double().mean(0).float())
    assert rows[266:].equal(model.model.embed_tokens.weight[266:])


def test_a_larger_tokenizer_is_refused_with_the_key_that_lets_embeddings_grow(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(tmp_path)
    own = f"model.tokenizer_name_or_path={tmp_path}"
    with pytest.raises(ConfigError, match=r"265 tokens.*only 264\. .*model\.resize_embeddings=true"):
        built(bases["llama"], own)
    with pytest.raises(ConfigError, match=r"model\.resize_embeddings=true"):
        built(bases["llama"], own, TOKENS)
    assert built(bases["llama"], own, "model.resize_embeddings=true").module.config.vocab_size == 265
    with pytest.raises(ConfigError, match=r"Set model\.config\.vocab_size=266, or leave it out"):
        config = compose(["model=tiny_llama", "model.config.vocab_size=264", TOKENS, "data=arithmetic"])
        build_model(config, build_vocabulary(config).tokenizer)


def test_new_tokens_are_refused_where_transformers_cannot_resize_the_embedding(tmp_path: Path) -> None:
    config = AutoConfig.for_model("xlstm", vocab_size=264, hidden_size=32, num_hidden_layers=1, num_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"embedding of xlstm cannot grow from 264 to 266 .*model\.add_tokens=\[\]"):
        built(tmp_path, TOKENS)


def test_files_of_a_resumed_run_are_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(bases["llama"], TOKENS)
    vocabulary = build_vocabulary(config)
    first = build_model(config, vocabulary.tokenizer, new_token_ids=vocabulary.new_token_ids)
    for name, data in static_files(first, vocabulary.tokenizer).items():
        (tmp_path / name).write_bytes(data)
    again = build_model(config, vocabulary.tokenizer, new_token_ids=vocabulary.new_token_ids, resumed_from=tmp_path)
    assert static_files(again, vocabulary.tokenizer) == static_files(first, vocabulary.tokenizer)
    assert again.new_rows.ids == () and first.new_rows.ids == (264, 265)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ('[""]', r"model\.add_tokens\[0\] must be a text that is not empty"),
        ("[7]", r"model\.add_tokens\[0\] must be a text"),
        ('[{content: "<a>", specail: true}]', r"model\.add_tokens\[0\]\.specail is no field.* Did you mean special\?"),
        ('[{content: "<a>", special: 1}]', r"model\.add_tokens\[0\]\.special must be true or false"),
        ("[{special: true}]", r"model\.add_tokens\[0\] must be a text"),
    ],
)
def test_what_is_no_token_is_named(bases: dict[str, Path], tokens: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(bases["llama"], f"model.add_tokens={tokens}")
