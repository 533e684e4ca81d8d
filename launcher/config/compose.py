"""Hydra: overrides → RunConfig. Every mistake is reported in one go, in under a second: imports no torch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.default_element import InputDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from launcher.base.errors import ConfigError, UserError
from launcher.base.paths import conf_dir
from launcher.config.arguments import split_arguments
from launcher.config.optimizers import left_over_arguments
from launcher.config.overrides import Checked, Groups, check, choice_name
from launcher.config.parse import parse_config
from launcher.config.settings import RunConfig

_PRIMARY = "train"
_MODEL, _MODEL_TYPE = "tiny_llama", "llama"
"""The default choice of the group `model`."""

_SOURCES = ("data.train_files", "data.dataset_name", "data.sources", "data.generator")
_GENERATOR_KEYS = ("data.generator", "data.generator._target_")

SELECTING_KEYS = ("model.model_name_or_path", "model.config.model_type", *_SOURCES, *_GENERATOR_KEYS)
"""Settings that decide which defaults of the other settings are used."""


def compose_arguments(argv: Sequence[str]) -> RunConfig:
    """The config that a command line describes: `[--config-dir DIR] OVERRIDE…`, or `--config-file FILE`.

    Raises:
        ConfigError: with every problem. UserError: an option is wrong.
    """
    arguments = split_arguments(argv)
    if arguments.config_file is None:
        return compose(arguments.overrides, arguments.config_dir)
    if arguments.overrides:
        raise UserError("--config-file is a whole config: it takes no overrides beside it")
    return read_config(Path(arguments.config_file))


def read_config(path: Path) -> RunConfig:
    """A composed config as a run leaves it in its config.yaml.

    Raises:
        UserError: it cannot be read. ConfigError: it is not valid.
    """
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # YAML's and OmegaConf's errors have no common class
        raise UserError(f"--config-file {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or None in data.values():
        raise UserError(f"--config-file {path} holds no settings of a run. It must be a config.yaml as a run leaves it")
    return parse_config({str(k): v for k, v in data.items()})


def compose(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """Composes and checks the settings of one run.

    Args:
        config_dir: joins the search path, as does ./conf where it exists.

    Raises:
        ConfigError: with every problem found.
    """
    checked, composed = _check_and_compose(overrides, config_dir)
    problems = checked.problems
    if composed is not None:
        try:
            data = to_plain(composed)
            if isinstance(own := data.pop("experiment", None), dict):
                problems += [
                    f"experiment.{key}: an experiment's first line must be `# @package _global_`" for key in own
                ]
            config = parse_config(data, checked.keys, checked.bad_keys)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def parse_overrides(overrides: Sequence[str], config_dir: str | None = None) -> list[Override]:
    """Overrides of a sweep, which may give several values to a key.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    checked = check_sweep(overrides, config_dir)
    if checked.problems:
        raise ConfigError(checked.problems)
    return checked.parsed


def check_sweep(overrides: Sequence[str], config_dir: str | None = None) -> Checked:
    """The same, with what is wrong beside what is good."""
    with _hydra(config_dir) as groups:
        checked = check(overrides, groups, is_sweep=True)
        for override in checked.parsed:
            override.config_loader = GlobalHydra.instance().config_loader()  # glob(*) lists the choices of a group
    return checked


def compose_hydra(overrides: Sequence[str], config_dir: str | None = None, named: Collection[str] = ()) -> DictConfig:
    """The composed config with Hydra's own node in it, its values unchecked: what a sweep starts from.

    Args:
        named: keys that a sweep gives values to later; the demo runs only where it does not name data or a model.

    Raises:
        ConfigError: an override, a group or a choice is wrong.
    """
    checked, composed = _check_and_compose(overrides, config_dir, named)
    if checked.problems or composed is None:
        raise ConfigError(checked.problems)
    return composed


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """The resolved settings without Hydra's node.

    Raises:
        ConfigError: an interpolation leads nowhere.
    """
    settings = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        data = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key or 'the config'}: {_first_line(error)}{_mend(error)}"]) from error
    return {str(key): value for key, value in data.items()} if isinstance(data, dict) else {}


def _mend(error: OmegaConfBaseException) -> str:
    """How to write what bash and Hydra both read as their own."""
    if not isinstance(error, InterpolationKeyError):
        return ""
    name = str(error).partition("'")[2].partition("'")[0]
    if not str(error.full_key).startswith(("launch.setup", "launch.env")):
        return f". For a variable of the environment: ${{oc.env:{name}}}"
    return f". ${{{name}}} is read by Hydra. For the shell's variable, write ${name} without braces"


# --------------------------------------------------------------------------- Hydra


class _Repository(ConfigRepository):
    """Hydra's, but `override /checkpoint: off` in a file means the choice `off`, which YAML 1.1 reads as False."""

    def _create_defaults_list(self, config_path: str, defaults: ListConfig) -> list[InputDefault]:
        for item in defaults._iter_ex(resolve=False):
            if isinstance(item, DictConfig):
                for key, value in item.items():
                    if value is False:
                        group = str(key).split(" ")[-1].partition("@")[0].lstrip("/")
                        with open_dict(item):
                            item[key] = choice_name(False, self.get_group_options(group, ObjectType.CONFIG))
        return super()._create_defaults_list(config_path, defaults)


@contextlib.contextmanager
def _hydra(config_dir: str | None) -> Iterator[Groups]:
    """Hydra over the packaged conf/, then `config_dir`, then ./conf; restores a Hydra that was there before."""
    extra = [Path(name).expanduser().resolve() for name in (config_dir, "conf") if name is not None]
    extra = [folder for folder in extra if folder.is_dir() and folder != conf_dir()]
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, ConfigLoaderImpl)
            schema = loader.config_search_path.get_path().pop()
            for folder in extra:
                loader.config_search_path.append("launcher", f"file://{folder}")
            loader.config_search_path.append(schema.provider or "schema", schema.path or "structured://")
            loader.repository = _Repository(loader.config_search_path)
            yield Groups(loader)
    finally:
        GlobalHydra.instance().hydra = before


def _check_and_compose(
    overrides: Sequence[str], config_dir: str | None, named: Collection[str] = ()
) -> tuple[Checked, DictConfig | None]:
    """Composes what is good of the overrides; a problem that Hydra finds joins the others."""
    with _hydra(config_dir) as groups:
        checked = check(overrides, groups)
        if config_dir is not None and not Path(config_dir).expanduser().is_dir():
            checked.problems.append(f"--config-dir {config_dir} is no folder (looked in {Path.cwd()})")
        texts = checked.texts if _is_demo([*checked.keys, *named]) else ["experiment=none", *checked.texts]
        try:
            composed = _call_hydra(texts)
            if replaced := _replaced_choices(checked, composed):
                composed = _call_hydra([*texts, *replaced])
            if left_over := _left_over_arguments(checked, composed, groups):
                composed = _call_hydra([*texts, *replaced, *left_over])
            return checked, composed
        except (HydraException, OmegaConfBaseException) as error:
            checked.problems.append(_first_line(error))
        except (YAMLError, UnicodeDecodeError, OSError) as error:
            checked.problems.append(_unreadable(error))
        return checked, None


def _call_hydra(texts: list[str]) -> DictConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Hydra's own renamings; nothing a user could act on
        return hydra_compose(_PRIMARY, overrides=texts, return_hydra_config=True)


def _unreadable(error: YAMLError | UnicodeDecodeError | OSError) -> str:
    """Of a file of conf/ or of the user's own."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1} is no YAML: {error.problem}"
    if isinstance(error, OSError):
        return f"{error.filename or 'a settings file'} cannot be read: {error.strerror}"
    return f"a settings file in conf/ or --config-dir is no UTF-8 text: {error}"


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, (HydraException, OmegaConfBaseException)) else error
    return " ".join(str(cause).split("\n    ")[0].split()) or type(cause).__name__


# --------------------------------------------------------------------------- the demo, and what replaces it


def _is_demo(keys: Sequence[str]) -> bool:
    """Whether the default experiment runs: no experiment, data or model of the user's own is named."""
    return not any(key in ("experiment", "data", "model", *SELECTING_KEYS) for key in keys)


def _replaced_choices(checked: Checked, composed: DictConfig) -> list[str]:
    """Choices of model and data that nobody asked for step aside where others are named.

    Looks at the result, so that an experiment file of the user's own can name them as well as an override.
    """
    replaced, keys = [], checked.keys
    model, data = composed.get("model") or {}, composed.get("data") or {}
    if "model" not in keys:
        if model.get("model_name_or_path") and model.get("config"):
            replaced.append("model=pretrained")
        elif _is_other_type(composed):
            replaced.append("model=scratch")
    sources = [key for key in _SOURCES if data.get(key.removeprefix("data."))]
    if "data" not in keys and (len(sources) > 1 or any(key in _GENERATOR_KEYS for key in keys)):
        replaced.append("data=files")
    if any(key in _SOURCES for key in keys):  # a source of an experiment gives way to the one that is typed
        replaced += [f"++{key}=null" for key in sources if key not in keys and not _is_own_generator(key, keys)]
    return replaced


def _left_over_arguments(checked: Checked, composed: DictConfig, groups: Groups) -> list[str]:
    """Takes out what a preset of conf/optim brought along for an optimizer that is another one now."""
    choice = composed.hydra.runtime.choices.get("optim")
    preset = groups.loader.repository.load_config(f"optim/{choice}") if choice else None
    if preset is None or not isinstance(preset.config, DictConfig):
        return []
    theirs, ours = (OmegaConf.to_container(node, resolve=False) for node in (preset.config, composed.optim))
    assert isinstance(theirs, dict) and isinstance(ours, dict)
    named = {key.removeprefix("optim.kwargs.") for key in checked.keys}
    for override in checked.parsed:
        if override.key_or_group == "optim.kwargs" and isinstance(value := override.value(), dict):
            named |= {str(name) for name in value}
    preset_fields, fields = ({str(key): value for key, value in node.items()} for node in (theirs, ours))
    return [f"~optim.kwargs.{name}" for name in left_over_arguments(preset_fields, fields, named)]


def _is_own_generator(key: str, keys: Sequence[str]) -> bool:
    return key == "data.generator" and "data.generator._target_" in keys


def _is_other_type(composed: DictConfig) -> bool:
    """Whether model.config describes another kind of model than the default choice, whose fields would not fit it."""
    config = composed.model.get("config") or {}
    return composed.hydra.runtime.choices.get("model") == _MODEL and config.get("model_type") != _MODEL_TYPE
