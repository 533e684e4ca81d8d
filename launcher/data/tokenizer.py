"""The tokenizer of a run: the model's own, or the built-in byte tokenizer for a model trained from scratch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.base.errors import ConfigError
from launcher.base.internet import why_unreachable
from launcher.config.settings import RunConfig, expanded, is_local_path
from launcher.config.templates import read_template

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
THINK = ("<think>", "</think>")
NUM_BYTES = 256
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
MAX_TOKENS = 1 << 20  # only a warning threshold of transformers: bytes have no limit of their own

BYTE_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{%- if message.reasoning_content -%}{{- '<think>' + message.reasoning_content + '</think>' -}}{%- endif -%}
{{- (message.content or '') + '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- (message.content or '') + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what `model.add_tokens` did to it."""

    tokenizer: Any
    new_token_ids: tuple[int, ...]
    """Of the tokens that it did not have."""
    known_tokens: tuple[str, ...]
    """Those that it had already, as it has them."""

    def notices(self) -> list[str]:
        """What the user should know."""
        if not self.known_tokens:
            return []
        names = ", ".join(self.known_tokens)
        return [f"model.add_tokens: {names} {'is' if len(self.known_tokens) == 1 else 'are'} in the tokenizer already"]


def build_tokenizer(config: RunConfig) -> Any:
    """A PreTrainedTokenizerBase with a pad token and, where `data.chat_template` is set, that template.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or the template file does not exist.
    """
    return build_vocabulary(config).tokenizer


def build_vocabulary(config: RunConfig) -> Vocabulary:
    """The tokenizer of a run, with the tokens of `model.add_tokens`; errors as `build_tokenizer`."""
    name = _source(config)
    tokenizer = _load(config, name) if name else byte_tokenizer()
    new_token_ids, known = _add_tokens(tokenizer, config.model.add_tokens)
    if config.model.eos_token is not None:
        _set_eos(tokenizer, config.model.eos_token)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                [f"the tokenizer {name} has neither a pad nor an eos token. Set model.tokenizer_name_or_path"]
            )
        tokenizer.pad_token = tokenizer.eos_token  # harmless: what bears loss is decided by masks, not by token ids
    return Vocabulary(tokenizer, new_token_ids, known)


def _source(config: RunConfig) -> str | None:
    """Where the tokenizer is: an adapter that was trained with one of its own goes on with it."""
    model = config.model
    if model.tokenizer_name_or_path:
        return model.tokenizer_name_or_path
    return _of_adapter(model.adapter_name_or_path) or model.model_name_or_path


def _of_adapter(name: str | None) -> str | None:
    """The folder of an adapter that has a tokenizer; of one on the Hub the tokenizer is downloaded first."""
    if not name:
        return None
    if is_local_path(name):
        return name if (Path(expanded(name)) / _TOKENIZER_FILES[0]).is_file() else None
    from transformers.utils.hub import cached_file

    found = {}
    for file in _TOKENIZER_FILES:
        try:
            found[file] = cached_file(name, file)
        except (OSError, ValueError):  # none there; or no such adapter, which is named where it is loaded
            found[file] = None
        if not found[_TOKENIZER_FILES[0]]:
            return None
    return str(Path(str(found[_TOKENIZER_FILES[0]])).parent)


def _add_tokens(tokenizer: Any, tokens: Sequence[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Adds what `tokenizer.add_tokens` of transformers would; (ids of the new ones, those that were there)."""
    from tokenizers import AddedToken

    before = tokenizer.get_vocab()
    wanted: dict[str, Any] = {}
    for token in tokens:
        fields = token if isinstance(token, dict) else {"content": token}
        # As in transformers: ordinary tokens are looked for in normalised text, special ones in the text as it is.
        fields = {"normalized": not fields.get("special", False), **fields}
        wanted.setdefault(fields["content"], AddedToken(**fields))
    tokenizer.add_tokens([token for content, token in wanted.items() if content not in before])
    vocabulary = tokenizer.get_vocab()
    new = tuple(vocabulary[content] for content in wanted if content not in before)
    return new, tuple(content for content in wanted if content in before)


def _set_eos(tokenizer: Any, token: str) -> None:
    if token not in tokenizer.get_vocab():
        special = ", ".join(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special) or "none"
        raise ConfigError(
            [f"model.eos_token={token} is not in the tokenizer's vocabulary. Its special tokens: {special}"]
        )
    tokenizer.eos_token = token


def byte_tokenizer() -> Any:
    """A PreTrainedTokenizerFast of 256 bytes and 8 special tokens, the same on every machine; needs no file.

    Ids 0-255 are the bytes themselves. `<think>` and `</think>` are one token each but ordinary text when decoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, END, *ROLES)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    make: Any = PreTrainedTokenizerFast  # has no annotations
    return make(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        chat_template=BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )


def _byte_alphabet() -> list[str]:
    """The printable stand-in for each byte (GPT-2's bytes_to_unicode), in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]


def _load(config: RunConfig, name: str) -> Any:
    from transformers import AutoTokenizer

    model = config.model
    revision = model.revision if name == model.model_name_or_path else None
    unreachable = None if Path(expanded(name)).is_dir() else why_unreachable()
    try:
        return AutoTokenizer.from_pretrained(
            expanded(name), revision=revision, trust_remote_code=model.trust_remote_code,
            local_files_only=unreachable is not None,
        )  # fmt: skip
    except Exception as error:  # whatever files that are cut off or of another kind make of it
        keys = ("tokenizer_name_or_path", "model_name_or_path")
        key = next((k for k in keys if getattr(model, k) == name), "adapter_name_or_path")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        if re.search("sentencepiece|tiktoken", str(error), re.I) and find_spec("sentencepiece") is None:
            reason += "; a tokenizer.model of SentencePiece needs: pip install sentencepiece protobuf"
        if unreachable is not None:
            raise ConfigError([
                f"model.{key}={name} is no folder here and not in the cache, and {unreachable}. Name a folder, or run "
                f"`launcher prefetch model.{key}={name} …` where there is internet, with the same HF_HOME"
            ]) from error  # fmt: skip
        raise ConfigError(
            [
                f"model.{key}={name}: no tokenizer can be loaded ({reason}). It must be a folder with tokenizer files "
                "or a Hub id; set model.tokenizer_name_or_path=FOLDER_OR_HUB_ID where the model has none"
            ]
        ) from error


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of everything that decides how this tokenizer turns rows into tokens."""
    import tokenizers
    import transformers

    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    else:
        backend = {"class": type(tokenizer).__qualname__, "vocab": tokenizer.get_vocab()}
    parts = {
        "backend": backend,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
