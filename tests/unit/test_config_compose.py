"""From overrides to settings: the demo, what replaces it, and every mistake at once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs import generate
from launcher.base.errors import ConfigError, UserError
from launcher.base.paths import conf_dir
from launcher.config.compose import compose, compose_arguments, compose_hydra, parse_overrides, to_plain
from launcher.config.optimizers import SHORT_NAMES
from launcher.config.rules import notices
from launcher.config.schema import valid_keys
from launcher.config.settings import RunConfig, to_dict

TOKEN = "hf_" + "a1B2c3D4" * 4


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    return str(path)


def problems(*overrides: str, config_dir: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir)
    return caught.value.problems


def problem(*overrides: str) -> str:
    (only,) = problems(*overrides)
    return only


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --------------------------------------------------------------------------- defaults, groups, experiments


def test_default_is_the_demo_when_nothing_of_the_users_is_named() -> None:
    config = compose([])
    assert config.output_dir == "outputs/arithmetic"
    assert (config.strategy.name, config.launch.num_processes) == ("zero2", 2)
    assert config.model.config["model_type"] == "llama"
    assert config.data.generator and config.eval.metric
    assert config.checkpoint.metric_key == "eval_exact_match"
    assert config.checkpoint.load_best_model_at_end


def test_demo_stays_when_only_its_settings_change() -> None:
    demo = compose([])
    changed = compose(["train.max_steps=20", "strategy=zero3", "model.config.hidden_size=64", "output_dir=x"])
    assert changed.data == demo.data
    assert changed.eval == demo.eval
    assert changed.model.config == {**demo.model.config, "hidden_size": 64}
    assert (changed.train.max_steps, changed.strategy.name, changed.output_dir) == (20, "zero3", "x")


def test_demo_goes_entirely_when_own_data_are_named(rows: str) -> None:
    config = compose([f"data.train_files={rows}"])
    assert config.data.train_files == [rows]
    assert config.data.generator == {} and config.eval.metric == {}
    assert config.checkpoint.metric_key == "eval_loss"
    assert (config.strategy.name, config.launch.num_processes, config.eval.eval_strategy) == ("auto", None, "no")
    assert config.model.config["model_type"] == "llama"
    assert config.output_dir == "outputs/run"


def test_experiment_gives_way_to_data_of_an_override(rows: str) -> None:
    config = compose(["experiment=arithmetic", f"data.train_files={rows}", f"data.eval_files={rows}"])
    assert config.data.generator == {} and config.eval.metric == {}
    assert config.strategy.name == "zero2"


def test_source_of_an_experiment_gives_way_to_the_one_that_is_typed(rows: str) -> None:
    config = compose(["experiment=openr1_distill", f"data.train_files={rows}", "model.model_name_or_path=org/small"])
    assert config.data.train_files == [rows] and config.data.dataset_name is None
    assert config.model.model_name_or_path == "org/small" and config.optim.learning_rate == 5e-6
    assert "set together" in problem(f"data.train_files={rows}", "data.dataset_name=org/data")


def test_arithmetic_data_stay_when_only_a_model_is_named() -> None:
    config = compose(["model.model_name_or_path=org/name"])
    assert config.model.config == {}
    assert config.data.generator
    assert config.strategy.name == "auto"


def test_default_model_steps_aside_when_another_type_is_described(rows: str) -> None:
    config = compose([f"data.train_files={rows}", "model.config={model_type: gpt2, n_embd: 32}"])
    assert config.model.config == {"model_type": "gpt2", "n_embd": 32}


def test_contradiction_is_reported_when_both_models_are_the_users() -> None:
    assert "both set" in problem("model.model_name_or_path=org/name", "model.config.hidden_size=8")


@pytest.mark.parametrize("path", sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_validates(path: str) -> None:
    compose([f"experiment={path}"])


def _choices() -> list[str]:
    groups = (p for p in conf_dir().rglob("*.yaml") if p.parent != conf_dir())
    return sorted(f"{p.parent.relative_to(conf_dir()).as_posix()}={p.stem}" for p in groups)


@pytest.mark.parametrize("choice", [c for c in _choices() if not c.startswith(("experiment=", "hydra/sweeper"))])
def test_every_choice_composes_and_validates(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.config.trackers.is_installed", lambda module: True)
    needed = {
        "model=pretrained": ["model.model_name_or_path=org/name"],
        "model=scratch": ["model.config.model_type=llama"],
        "data=files": ["data.dataset_name=org/name", "data.eval_split=0.1"],
    }
    data = [] if choice.startswith("data=") else ["data=arithmetic"]
    compose([choice, *data, "eval.eval_strategy=steps", *needed.get(choice, [])])


def test_openr1_distill_holds_the_settings_of_the_job() -> None:
    config = compose(["experiment=openr1_distill"])
    assert config.optim.learning_rate == 5e-6
    assert (config.checkpoint.save_steps, config.checkpoint.save_total_limit) == (500, 5)
    assert config.checkpoint.metric_key == "eval_loss" and config.checkpoint.load_best_model_at_end
    assert (config.mixed_precision, config.strategy.name) == ("bf16", "zero3")
    assert config.model.gradient_checkpointing
    assert config.data.dataset_name == "open-r1/OpenR1-Math-220k"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("recommended", ("steps", 500, 5, True)),
        ("best", ("best", 500, 1, True)),
        ("last", ("steps", 500, 1, False)),
        ("all", ("steps", 500, None, False)),
        ("off", ("no", 500, None, False)),
    ],
)
def test_checkpoint_choices(choice: str, expected: tuple[Any, ...]) -> None:
    ck = compose([f"checkpoint={choice}", "data=arithmetic", "eval.eval_strategy=steps"]).checkpoint
    assert (ck.save_strategy, ck.save_steps, ck.save_total_limit, ck.load_best_model_at_end) == expected


def test_peft_choice_switches_lora_on() -> None:
    assert compose([]).model.peft == {}
    assert compose(["model/peft=lora", "model.peft.r=4"]).model.peft["r"] == 4


@pytest.mark.parametrize(
    "override",
    [
        "model.config.rope_theta=1e5", "launch.sbatch.cpus-per-task=4", "model.peft.r=8", "optim.kwargs.fused=true",
        "data.generator.num_eval=8", "eval.metric.max_rows=3", "strategy.deepspeed.zero_optimization.overlap_comm=true",
        "tracker.init_kwargs.wandb.entity=me", "launch.env.NCCL_DEBUG=INFO", "+launch.sbatch.qos=high",
        "scheduler.lr_scheduler_kwargs.num_cycles=3",
    ],
)  # fmt: skip
def test_open_groups_take_new_keys_without_plus(override: str) -> None:
    key, _, value = override.lstrip("+").partition("=")
    node: Any = to_dict(compose([override]))
    for name in key.split("."):
        node = node[name]
    assert str(node).lower() == value.lower() or float(node) == float(value)


def test_false_means_off_when_yaml_made_it_of_no(tmp_path: Path) -> None:
    write(
        tmp_path / "conf/experiment/quiet.yaml",
        "# @package _global_\ndefaults:\n  - override /checkpoint: off\n  - override /tracker: off\n"
        "checkpoint:\n  save_strategy: no\neval:\n  eval_strategy: off\n",
    )
    for overrides in (["experiment=quiet"], ["checkpoint=False", "tracker=false", "eval.eval_strategy=false"]):
        config = compose(overrides)
        assert config.checkpoint.save_strategy == config.eval.eval_strategy == "no"
        assert config.tracker.name is None


def test_own_configs_join_the_search_path(tmp_path: Path, rows: str) -> None:
    body = f"# @package _global_\nmodel:\n  model_name_or_path: org/own\ndata:\n  train_files: [{rows}]\n"
    write(tmp_path / "conf/experiment/here.yaml", body)
    write(tmp_path / "elsewhere/experiment/there.yaml", body)
    assert compose(["experiment=here"]).model.model_name_or_path == "org/own"
    there = compose_arguments(["experiment=there", "--config-dir", str(tmp_path / "elsewhere"), "seed=3"])
    assert (there.data.train_files, there.data.generator, there.seed) == ([rows], {}, 3)
    assert "hydra" not in to_dict(there)


def test_experiment_without_its_package_line_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "conf/experiment/bare.yaml", "seed: 3\n")
    assert "# @package _global_" in problem("experiment=bare")


def test_hydra_writes_nothing(tmp_path: Path) -> None:
    compose([])
    assert list(tmp_path.iterdir()) == []


def test_config_file_is_taken_as_it_is(tmp_path: Path) -> None:
    import yaml

    config = compose(["seed=7", "run_name=kept"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert compose_arguments(["--config-file", str(path)]) == config
    with pytest.raises(UserError, match="no overrides"):
        compose_arguments([f"--config-file={path}", "seed=8"])
    with pytest.raises(UserError, match="cannot be read"):
        compose_arguments(["--config-file", "absent.yaml"])


def test_defaults_of_the_classes_are_those_of_conf(rows: str) -> None:
    """What is given by nobody must not depend on where it is looked up."""
    composed = to_dict(compose([f"data.train_files={rows}"]))
    classes = to_dict(RunConfig())
    for group in ("train", "eval", "hub", "tracker", "launch", "sweep", "strategy"):
        assert composed[group] == classes[group]
    composed["data"].pop("train_files"), classes["data"].pop("train_files")
    assert composed["data"] == classes["data"]


# --------------------------------------------------------------------------- mistakes


def test_all_mistakes_are_reported_at_once() -> None:
    found = "\n".join(
        problems(
            "trian.max_steps=3", "strategy.name=single", "launch.num_processes=2", "train.max_steps=abc", "a=b=c",
            "data.train_files=absent.jsonl", "checkpoint.save_total_limit=0", "optim=adamv", "seed=1,2",
            "model.dtype=bfloat16", "train.mixed_precision=fp16", "checkpoint.resume_from_checkpoint=nowhere",
        )
    )  # fmt: skip
    for expected in (
        "Did you mean train.max_steps=3?", "strategy=single runs one process", "train.max_steps must be a whole number",
        "'a=\"b=c\"'", "absent.jsonl does not exist", "save_total_limit must be at least 1",
        "Did you mean optim=adamw?", "seed=[1,2]", "contradicts model.dtype=bfloat16",
        "resume_from_checkpoint=nowhere is no folder",
    ):  # fmt: skip
        assert expected in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps=0", "train.max_steps must be at least 1, or -1 for train.num_train_epochs (got 0)"),
        ("train.num_train_epochs=0", "train.num_train_epochs must be above 0"),
        ("train.num_train_epochs=inf", "(got inf): train.num_train_epochs=1"),
    ],
)
def test_a_run_without_an_end_or_a_step_is_refused_with_what_is_valid(rows: str, override: str, expected: str) -> None:
    found = problem(f"data.train_files={rows}", "train.max_steps=-1", override)
    assert expected in found and "launcher preview" in found


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.max_stps=5", "train.max_steps=5"),
        ("learning_rate=1e-4", "optim.learning_rate=1e-4"),
        ("train.learning_rate=1e-4", "optim.learning_rate=1e-4"),
        ("stratgy=zero2", "strategy=zero2"),
        ("checkpoint.save_stps=5", "checkpoint.save_steps=5"),
        ("modle.dtype=bfloat16", "model.dtype=bfloat16"),
        ("save_total_limit=2", "checkpoint.save_total_limit=2?"),
        ("gradient_accumulation_steps=4", "train.train_batch_size"),
    ],
)
def test_mistyped_key_gets_the_right_one(override: str, meant: str) -> None:
    assert meant in problem(override)


@pytest.mark.parametrize(
    "override", ["strategy=zero5", "experiment=nothing", "model/peft=lorra", "hydra/launcher=slrm"]
)
def test_unknown_choice_lists_the_valid_ones(override: str) -> None:
    text = problem(override)
    assert override.partition("=")[0] in text and "Valid: " in text


def test_unknown_group_lists_the_valid_ones() -> None:
    assert "model/peft" in problem("model/pefd=lora")


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("output_dir=a=b", "'output_dir=\"a=b\"'"),
        ("run_name=a(b", "'run_name=\"a(b\"'"),
        ("data.train_files=[a.jsonl", "'data.train_files=\"[a.jsonl\"'"),
    ],
)
def test_grammar_error_shows_the_quoting_that_works(override: str, quoted: str) -> None:
    assert quoted in problem(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("=3", "'=3' names no setting"), ("~=3", "names no setting"), ("~train", "Set train.KEY=VALUE"),
        ("~train.max_steps", "Set train.max_steps=VALUE"), ("~data.train_files", "KEY=[] empties a list"),
    ],
)  # fmt: skip
def test_override_that_names_nothing_or_takes_away_is_refused(override: str, said: str) -> None:
    assert said in problem(override)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"train:\n\tmax_steps: 3\n", "broken.yaml:2 is no YAML"), (b"seed: 1\nseed: 2\n", "broken.yaml:2 is no YAML"),
        (b"seed: [1\n", "is no YAML"), (b"run_name: \xff\xfe\n", "is no UTF-8 text"),
    ],
)  # fmt: skip
def test_file_of_settings_is_named_when_it_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/broken.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        compose(["experiment=broken", "lr=3"], config_dir=str(tmp_path))
    assert said in str(raised.value)
    assert "optim.learning_rate=3" in str(raised.value), "all problems at once"


def test_choices_are_named_when_yaml_reads_one_as_true() -> None:
    assert "train.on_spike must be one of off, skip, rollback (got True)" in problem("train.on_spike=true")


def test_off_is_a_choice_when_yaml_reads_it_as_false() -> None:
    assert compose(["data=arithmetic", "train.on_spike=false"]).train.on_spike == "off"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["checkpoint=best", "data=arithmetic"], "checkpoint.save_strategy=best needs an evaluation"),
        (["data=arithmetic", "checkpoint.load_best_model_at_end=true"], "but eval.eval_strategy=no"),
        (["checkpoint=off", "checkpoint.load_best_model_at_end=true"], "but checkpoint.save_strategy=no"),
        (["checkpoint.metric_for_best_model=bleu", "eval.metric=null"], "measured by nothing"),
        (["launch.num_processes=3", "launch.num_machines=2"], "must be a multiple"),
        (["launch.sbatch={time: 43200}"], "launch.sbatch.time=\"'12:00:00'\""),
        (["launch.env.HF_TOKEN=$HF_TOKEN"], "leave launch.env.HF_TOKEN out"),
        (["hub.push_to_hub=true", "checkpoint=off"], "hub.hub_strategy=every_save sends checkpoints"),
        (["hub.hub_model_id=a/b/c"], "must be ORG/NAME"),
        (["model.model_name_or_path=./absent"], "does not exist"),
        (["data.eval_split=1.5"], "between 0 and 1"),
        (
            ["+data.columns.promt=q"],
            "data.columns.promt is no name of ours; it is data.columns.OURS=YOURS. Did you mean",
        ),
        (["data.columns.text=null"], "data.columns.text must be the name of a column (got None)"),
        (["data.loss_on=last_assistant_turn", "data.completion_only_loss=false"], "contradict each other"),
        (["checkpoint.save_steps=often"], "whole number or auto"),
        (["model=pretrained"], "model.model_name_or_path is not set"),
        (["data=files"], "no training data"),
        (["data.sources=[{weight: 1}]"], "either train_files or dataset_name"),
        (["scheduler=reduce_lr_on_plateau", "data=arithmetic"], "eval.eval_strategy=steps"),
        (["train.train_batch_size=0"], "at least 1"),
        (["train.full_determinism=maybe"], "true or false"),
        (["train.on_nonfinite=ignore"], "one of stop, skip"),
        (["run_name=1.5"], "Quote it"),
        (["model=3"], "model=3 is not a choice"),
        (["train=3"], "train is a group of settings"),
        (["--config-dir"], "cannot be read|is no override"),
    ],
)
def test_contradiction_names_key_and_mend(overrides: list[str], text: str) -> None:
    assert re.search(text if "|" in text else re.escape(text), problem(*overrides))


def test_what_is_wrong_with_sources_and_splits_joins_the_other_problems(rows: str) -> None:
    found = problems(f"data.sources=[{{train_files: {rows}, weigth: 3}}]", "data.eval_split=test", "seed=-1")
    assert [text.partition(" ")[0] for text in found] == ["seed", "data.sources[0].weigth", "data.eval_split=test"]
    assert found[1].endswith("Did you mean weight?") and "data.eval_split=0.01" in found[2]
    assert "data.eval_split=null" in problem(
        f"data.train_files={rows}", f"data.eval_files={rows}", "data.eval_split=0.1"
    )
    assert "Did you mean train_files?" in problem(f"data.sources=[{{train_file: {rows}}}]")


def test_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bad.jinja", "{% for m in messages %}\n{{ m.content | nothing }}{% endfor %}")
    assert "is no Jinja template: line 1: " in problem("data.chat_template='{{ bad'")
    assert "bad.jinja is no Jinja template: line 2: No filter named" in problem("data.chat_template=bad.jinja")
    assert "is neither a file nor a Jinja template" in problem("data.chat_template=chatml")
    write(
        tmp_path / "good.jinja",
        "{%- for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson(indent=2) }}{% endgeneration %}{{ raise_exception('x') }}"
        "{{ strftime_now('%d') }}{% endfor %}",
    )
    assert compose(["data.chat_template=good.jinja"]).data.chat_template == "good.jinja"


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9,1]", "0.9", "[0.9,a]", "[0.9,0.99,0.999]", "[-0.1,0.9]"])
def test_betas_are_two_numbers_below_one(betas: str) -> None:
    assert problem(f"optim.kwargs.betas={betas}").startswith("optim.kwargs.betas must be two numbers from 0 to below 1")
    assert compose(["optim.kwargs.betas=[0.9,0.999]"]).optim.kwargs["betas"] == [0.9, 0.999]
    assert compose(["optim.name=mine.Adan", "optim.kwargs.betas=[0.98,0.92,0.99]"]).optim.name == "mine.Adan"


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        (["checkpoint=best"], "Set eval.eval_strategy=steps data.eval_split=0.01, or"),
        (["train.early_stopping_patience=2"], "Set eval.eval_strategy=steps data.eval_split=0.01, or"),
        (["scheduler=reduce_lr_on_plateau"], "Set eval.eval_strategy=steps data.eval_split=0.01"),
        (["eval.in_background=true"], "Set eval.eval_strategy=steps data.eval_split=0.01, "),
        (["checkpoint=best", "data.eval_split=0.5"], "Set eval.eval_strategy=steps, or"),
        (["checkpoint.save_steps=-1"], "To save only at the end: checkpoint.save_steps=1000000000; "),
    ],
)
def test_hint_works_when_it_is_typed(rows: str, wrong: list[str], mend: str) -> None:
    typed = [f"data.train_files={rows}", *wrong]
    assert mend in problem(*typed)
    compose([*typed, *re.findall(r"[a-z]+\.[a-z_]+=[\w.]+", mend)])


def test_config_dir_that_is_absent_joins_the_other_problems() -> None:
    assert len(problems("bad.key=1", config_dir="absent")) == 2


def test_rule_stays_silent_when_its_setting_is_wrong_in_itself() -> None:
    """`data.train_files=3` must not also be told that there is no training data."""
    assert problem("data.train_files=3").startswith("data.train_files must be")
    assert "Did you mean model.model_name_or_path" in problem("model=pretrained", "model.model_name_or_pth=org/name")


def test_recommended_checkpoints_need_no_evaluation(rows: str) -> None:
    """Its load_best_model_at_end means the best one if there is one; only who sets it himself is held to it."""
    config = compose([f"data.train_files={rows}", "checkpoint=recommended"])
    assert config.checkpoint.load_best_model_at_end and config.eval.eval_strategy == "no"
    assert notices(config) == []


def test_evaluation_data_that_nothing_uses_are_noticed(rows: str) -> None:
    (notice,) = notices(compose([f"data.train_files={rows}", f"data.eval_files={rows}"]))
    assert "data.eval_files is not used" in notice


@pytest.mark.parametrize(
    "override",
    [
        f"hub.token={TOKEN}", f"run_name={TOKEN}", f"launch.env.HF_TOKEN={TOKEN}",
        "tracker.init_kwargs.wandb.api_key=abc", "launch.env.WANDB_API_KEY=abc", "launch.env.AWS_SECRET_ACCESS_KEY=abc",
    ],
)  # fmt: skip
def test_secret_is_refused_and_not_repeated(override: str) -> None:
    text = problem(override)
    assert "looks like a" in text and TOKEN not in text


def test_token_of_the_environment_is_refused_when_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    text = "\n".join(problems("run_name=${oc.env:SOME_TOKEN}"))
    assert "run_name holds what looks like a secret" in text and TOKEN not in text


def test_pad_token_is_no_secret() -> None:
    compose(["model.config.pad_token_id=0", "eval.metric.end_token=x"])


def test_time_of_the_command_line_is_minutes_and_one_of_a_file_is_refused(tmp_path: Path) -> None:
    for key, value in (("time", 20), ("time-min", 5), ("time", 0)):
        assert compose([f"launch.sbatch.{key}={value}"]).launch.sbatch[key] == str(value)
    write(tmp_path / "conf/launch/mine.yaml", "name: slurm\nsbatch:\n  time: 12:00:00\n")
    text = problem("launch=mine")
    assert "launch.sbatch.time=43200 is a number" in text
    for hint in ("launch.sbatch.time=43200", "launch.sbatch.time='12:00:00'"):
        compose(["launch=mine", hint])


def test_hint_works_when_fields_of_a_pretrained_models_config_are_set() -> None:
    given = ["model.model_name_or_path=org/name", "model.config.vocab_size=100"]
    text = problem(*given)
    assert "vocab_size" in text and "model.config=null" in text and "model.model_name_or_path=null" in text
    compose([given[0], "model.config=null"])
    compose(["model.model_name_or_path=null", given[1]])


@pytest.mark.parametrize(
    ("overrides", "name", "kwargs"),
    [
        (["optim.name=my.Optimizer"], "my.Optimizer", {}),
        (["optim.name=my.Optimizer", "optim.kwargs.betas=[0.9,0.999]"], "my.Optimizer", {"betas": [0.9, 0.999]}),
        (["optim.name=SGD", "optim.kwargs={momentum: 0.8}"], "torch.optim.SGD", {"momentum": 0.8}),
        (["optim=sgd", "optim.name=AdamW"], "torch.optim.AdamW", {}),
        (["optim.name=adamw"], "torch.optim.AdamW", {"betas": [0.9, 0.999], "eps": 1e-8}),
        (["optim.kwargs={}"], "torch.optim.AdamW", {}),
        (["optim=sgd"], "torch.optim.SGD", {"momentum": 0.9}),
    ],
)
def test_arguments_of_a_preset_go_with_its_optimizer(overrides: list[str], name: str, kwargs: dict[str, Any]) -> None:
    optim = compose(overrides).optim
    assert (optim.name, optim.kwargs) == (name, kwargs)


def test_arguments_of_a_preset_go_when_an_experiment_names_another_optimizer(tmp_path: Path) -> None:
    body = "# @package _global_\noptim:\n  name: my.Optimizer\n  kwargs: {betas: [0.9, 0.95]}\n"
    write(tmp_path / "conf/experiment/mine.yaml", body)
    assert compose(["experiment=mine", "data=arithmetic"]).optim.kwargs == {"betas": [0.9, 0.95]}


def test_every_optimizer_of_torch_has_its_short_name() -> None:
    import torch

    known = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert set(SHORT_NAMES) >= known - {"Optimizer"}
    assert "Did you mean optim.name=torch.optim.AdamW?" in problem("optim.name=AdmW")


# --------------------------------------------------------------------------- what a sweep uses


def test_sweep_parses_several_values_and_checks_each_choice() -> None:
    given = parse_overrides(["seed=1,2", "strategy=zero1,zero2"])
    assert [override.is_sweep_override() for override in given] == [True, True]
    with pytest.raises(ConfigError, match="strategy=zero9"):
        parse_overrides(["strategy=zero1,zero9"])


def test_sweep_over_data_is_no_demo() -> None:
    assert compose_hydra([]).strategy.name == "zero2"
    composed = compose_hydra(["hydra/launcher=slurm"], named=["data.train_files"])
    assert composed.hydra.runtime.choices["hydra/launcher"] == "slurm"
    assert to_plain(composed)["strategy"]["name"] == "auto"


# --------------------------------------------------------------------------- the classes and their page


def test_page_of_the_settings_is_up_to_date() -> None:
    assert generate.TARGET.read_text() == generate.page(), "run: make docs"


def test_every_setting_is_explained() -> None:
    def walk(cls: Any) -> None:
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(valid_keys(cls)[f.name]):
                walk(valid_keys(cls)[f.name])
            else:
                assert f.metadata["doc"]

    walk(RunConfig)


@pytest.mark.parametrize("how", ["same", "relative", "link", "linked model", "trailing"])
def test_output_dir_is_refused_when_it_is_the_models_own_folder(tmp_path: Path, rows: str, how: str) -> None:
    write(tmp_path / "base/config.json", "{}")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    model, output_dir = {
        "same": (tmp_path / "base", tmp_path / "base"), "relative": (tmp_path / "base", "base"),
        "link": (tmp_path / "base", "link"), "linked model": (tmp_path / "link", "base"),
        "trailing": ("./base", f"{tmp_path}/other/../base/"),
    }[how]  # fmt: skip
    found = problem(f"data.train_files=[{rows}]", "model=pretrained", f"model.model_name_or_path={model}",
                    f"output_dir={output_dir}")  # fmt: skip
    assert "which the run would overwrite" in found and "output_dir=outputs/" in found


@pytest.mark.parametrize(
    ("output_dir", "why"),
    [
        ("file", "is a file"), ("file/run", "file, which is a file"), ("full/x" + "y" * 300, "too long"),
        ("loop/run", "loop"), ("'~nobody-of-that-name/run'", "home"), ("checkpoint-5", "the name of a checkpoint"),
    ],
)  # fmt: skip
def test_output_dir_is_refused_when_it_cannot_be_a_folder_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, output_dir: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "mine")
    (tmp_path / "loop").symlink_to("loop")
    found = problem(f"data.train_files=[{rows}]", f"output_dir={output_dir}")
    assert why in found and "output_dir=outputs/" in found


def test_output_dir_is_refused_when_it_and_a_checkpoint_hold_each_other(tmp_path: Path, rows: str) -> None:
    write(tmp_path / "run/checkpoint-10/config.json", "{}")
    common = (f"data.train_files=[{rows}]", "model=pretrained")
    own = f"model.model_name_or_path={tmp_path}/run/checkpoint-10"
    assert "is a checkpoint of output_dir" in problem(*common, own, "output_dir=run")
    assert "lies in the checkpoint" in problem(*common, own, "output_dir=run/checkpoint-10/more")
    compose((*common, own, "output_dir=run/finetuned"))
    compose((*common, own, "output_dir=other", "checkpoint.resume_from_checkpoint=run/checkpoint-10"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("d", "a b1 b[1] c"), ("d/", "a b1 b[1] c"), ("d/*.jsonl", "a b1 b[1]"), ("d/**/*.jsonl", "a b1 b[1] c"),
        ("d/b[1].jsonl", "b[1]"), ("d/b[0-9].jsonl", "b1"), ("d/.h.jsonl", ".h"), ("d/.*.jsonl", ".h"),
        ("d/.ipynb_checkpoints", "a-checkpoint"), ("d/*", "a b1 b[1]"), ("d/?.jsonl", "a"), ("d/z*.jsonl", ""),
        ("d/.ipynb_checkpoints/*.jsonl", "a-checkpoint"),
    ],
)  # fmt: skip
def test_hidden_files_count_only_when_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    from launcher.config.settings import expand_files

    files = ["a", ".h", "b1", "b[1]", "sub/c", ".ipynb_checkpoints/a-checkpoint"]
    for file in files:
        (tmp_path / "d" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / f"{file}.jsonl").write_text("{}")
    (tmp_path / "d" / "folder.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    for start in ("", f"{tmp_path}/"):
        assert [path.stem for path in expand_files([start + name])] == found.split()


def test_a_file_that_is_named_twice_is_told(tmp_path: Path) -> None:
    from launcher.config.rules import notices
    from launcher.config.settings import DataConfig, RunConfig

    (tmp_path / "a.jsonl").write_text("{}")
    config = RunConfig(data=DataConfig(train_files=[f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"]))
    assert any("a.jsonl 2 times: every row of it counts 2 times" in notice for notice in notices(config))


def test_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.config.settings import CheckpointConfig, DataConfig, ModelConfig, RunConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(
        model=ModelConfig(model_name_or_path="~/m", tokenizer_name_or_path="~/t"),
        data=DataConfig(dataset_name="~/d", cache_dir="~/c", sources=[{"dataset_name": "~/s"}]),
        checkpoint=CheckpointConfig(resume_from_checkpoint="~/r"),
    )
    found = [
        config.model.model_name_or_path, config.model.tokenizer_name_or_path, config.data.dataset_name,
        config.data.cache_dir, config.data.sources[0]["dataset_name"], config.checkpoint.resume_from_checkpoint,
    ]  # fmt: skip
    assert found == [str(tmp_path / name) for name in "mtdcsr"]


def test_evaluation_by_the_clock_needs_a_strategy() -> None:
    from launcher.config.rules import contradictions
    from launcher.config.settings import EvalConfig, RunConfig

    problems = "\n".join(contradictions(RunConfig(eval=EvalConfig(eval_every_s=60))))
    assert "eval.eval_every_s=60 evaluates but eval.eval_strategy=no. Set eval.eval_strategy=steps" in problems
