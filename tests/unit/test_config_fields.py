"""Fields of `model.config` that transformers would keep and no model reads."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.data.tokenizer import byte_tokenizer
from launcher.model.build import build_model, build_model_config
from launcher.model.fields import refuse_mistyped_fields, unknown_fields_notice
from tests.architectures import ARCHITECTURES, model_config


def test_mistyped_fields_are_refused_together_when_they_would_be_passed_over() -> None:
    config = compose(["data=arithmetic", "model.config.num_hiden_layers=1", "model.config.intermediate_sise=8"])
    with pytest.raises(ConfigError) as caught:
        build_model_config(config, byte_tokenizer(), None)
    assert caught.value.problems == [
        "model.config.num_hiden_layers is no field of LlamaConfig, which would pass over it. "
        "Did you mean model.config.num_hidden_layers?",
        "model.config.intermediate_sise is no field of LlamaConfig, which would pass over it. "
        "Did you mean model.config.intermediate_size?",
    ]


def test_mistyped_fields_of_an_inner_config_are_named_with_their_place() -> None:
    fields = {"model_type": "gemma3", "text_config": {"hidden_sise": 8}}
    with pytest.raises(ConfigError, match=r"^model\.config\.text_config\.hidden_sise is .*text_config\.hidden_size\?$"):
        refuse_mistyped_fields(fields, AutoConfig.for_model(**fields))


def test_fields_of_another_architecture_are_said_when_they_have_no_effect() -> None:
    built = build_model(compose(["data=arithmetic", "model.config.n_layer=1"]), byte_tokenizer())
    assert built.notices == [
        "model.config.n_layer: no field of LlamaConfig, and without effect unless the model's code asks for it"
    ]


def test_older_and_other_names_of_fields_are_known() -> None:
    for fields in (
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "llama", "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"], "id2label": {0: "a"}},
        {"model_type": "gpt2", "hidden_size": 64, "n_layer": 2, "num_labels": 3},
    ):
        assert unknown_fields_notice(fields, AutoConfig.for_model(**fields)) is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_whole_config_of_every_architecture_is_known(name: str) -> None:
    """As it is copied from a config.json."""
    fields = AutoConfig.for_model(model_config(name)["model_type"]).to_dict()
    made = AutoConfig.for_model(**fields)
    refuse_mistyped_fields(fields, made)
    assert unknown_fields_notice(fields, made) is None
