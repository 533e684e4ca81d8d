"""A row of a data set becomes tokens and a mask of those that bear loss, in TRL SFTTrainer's formats.

`text` gets an EOS; so does a `completion`; messages go through the chat template, which sets its own ends of turn.
Nothing gets a second BOS or EOS. Loss falls on completions and on assistant turns, unless completion_only_loss=false.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launcher.base.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadRowError(ValueError):
    """This row cannot be used; says why."""


@dataclass(frozen=True)
class Rendered:
    """A row as text, before it is tokenised."""

    text: str
    add_special_tokens: bool  # plain text only: a chat template writes its own BOS
    prompt: str | None = None  # loss starts where the tokens of `text` leave those of the prompt
    spans: list[tuple[int, int]] | None = None  # characters [start, end) that bear loss; None: all
    is_rewritten: bool = False  # the assistant's words are not in `text` as they were given


@dataclass(frozen=True)
class Encoded:
    """Tokens of a row, cut to max_length, and which of them bear loss (never the first: nothing predicts it)."""

    tokens: np.ndarray
    mask: np.ndarray
    is_truncated: bool
    is_rewritten: bool


@dataclass
class Formatter:
    """Validates, renders and tokenises rows.

    Args:
        tokenizer: a PreTrainedTokenizerBase.
        max_length: tokens; longer rows are cut at the end.
        completion_only_loss: None means true where a row has a completion or an assistant.
    """

    tokenizer: Any
    max_length: int
    completion_only_loss: bool | None
    has_generation_tags: bool = field(init=False)

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template or ""]
        self.has_generation_tags = all(_GENERATION_TAG.search(text) for text in templates)

    def encode(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Encoded | BadRowError]:
        """Encodes a batch of (where, row); the answers are in the same order.

        Raises:
            ConfigError: a setting does not fit the data at all (completion_only_loss on text; a chat template that
                is missing or rewrites earlier turns).
        """
        results: list[Encoded | BadRowError | None] = []
        rendered: list[Rendered] = []
        for where, row in rows:
            try:
                rendered.append(self._render(where, row))
                results.append(None)
            except BadRowError as problem:
                results.append(problem)
        encoded = iter(self._encode_rendered(rendered))
        return [next(encoded) if result is None else result for result in results]

    # ------------------------------------------------------------------ render

    def _render(self, where: str, row: dict[str, Any]) -> Rendered:
        row = {key: value for key, value in row.items() if value is not None}
        if "prompt" in row and "completion" in row:
            return self._render_completion(where, row)
        if "messages" in row:
            return self._render_messages(where, row)
        if "text" in row:
            return self._render_text(where, row)
        found = ", ".join(sorted(row)) or "nothing"
        raise BadRowError(f"has no messages, no prompt + completion and no text (it has {found})")

    def _render_text(self, where: str, row: dict[str, Any]) -> Rendered:
        if self.completion_only_loss:
            raise ConfigError(
                [
                    f"data.completion_only_loss=true needs messages or prompt + completion, but {where} holds text. "
                    "Set data.completion_only_loss=null (or false)"
                ]
            )
        return Rendered(self._with_eos(_text(row, "text")), add_special_tokens=True)

    def _render_completion(self, where: str, row: dict[str, Any]) -> Rendered:
        only = self.completion_only_loss is not False
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            prompt = _text(row, "prompt")
            text = self._with_eos(prompt + _text(row, "completion"))
            return Rendered(text, add_special_tokens=True, prompt=prompt if only else None)
        prompt_turns, completion_turns = _messages(row, "prompt"), _messages(row, "completion")
        text = self._chat(where, row, prompt_turns + completion_turns)
        is_rewritten = _is_rewritten(text, completion_turns)
        if not only:
            return Rendered(text, add_special_tokens=False, is_rewritten=is_rewritten)
        self._chat_start(where, row, prompt_turns, text)
        asked = self._chat(where, row, prompt_turns, add_generation_prompt=True)
        return Rendered(text, add_special_tokens=False, prompt=asked, is_rewritten=is_rewritten)

    def _render_messages(self, where: str, row: dict[str, Any]) -> Rendered:
        turns = _messages(row, "messages")
        if self.completion_only_loss is False:
            return Rendered(self._chat(where, row, turns), add_special_tokens=False)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRowError("messages has no assistant turn to learn from")
        if self.has_generation_tags:
            text, spans = self._chat_with_spans(where, row, turns)
        else:
            text = self._chat(where, row, turns)
            spans = self._spans_by_prefix(where, row, turns, text)
        return Rendered(text, add_special_tokens=False, spans=spans, is_rewritten=_is_rewritten(text, turns))

    def _spans_by_prefix(
        self, where: str, row: dict[str, Any], turns: list[dict[str, Any]], text: str
    ) -> list[tuple[int, int]]:
        """Where each assistant turn lies in `text`: between the prompt for it and the text with it."""
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            self._chat_start(where, row, turns[:i], text)
            until = self._chat_start(where, row, turns[: i + 1], text)
            asked = self._chat(where, row, turns[:i], add_generation_prompt=True) if i else ""
            spans.append((_common_length(asked, text), len(until)))
        return spans

    def _chat_start(self, where: str, row: dict[str, Any], turns: list[dict[str, Any]], text: str) -> str:
        """The first turns as text, which must be how the text of the whole conversation begins."""
        start = self._chat(where, row, turns) if turns else ""
        if not text.startswith(start):  # Phi-3's template, for one, closes whatever it renders with an EOS
            start = start.removesuffix(self.tokenizer.eos_token or "")
        if not text.startswith(start):
            raise self._rewriting_error(where)
        return start

    def _chat(self, where: str, row: dict[str, Any], turns: list[dict[str, Any]], **kwargs: Any) -> str:
        tools, kwargs = _tools(row), _template_kwargs(row) | kwargs
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **kwargs)
        except Exception as error:
            raise self._template_error(error) from error
        return text

    def _chat_with_spans(
        self, where: str, row: dict[str, Any], turns: list[dict[str, Any]]
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as returning str
        tools, kwargs = _tools(row), self.tokenizer.special_tokens_map | _template_kwargs(row)
        template = self.tokenizer.get_chat_template(tools=tools)
        try:
            texts, spans = render(
                conversations=[turns],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **kwargs,
            )
        except Exception as error:
            raise self._template_error(error) from error
        return texts[0], spans[0]

    def _template_error(self, error: Exception) -> Exception:
        """Templates are programs: whatever one raises, it refused this row, unless there is no template at all."""
        if not self.tokenizer.chat_template:
            return ConfigError(
                ["the data holds messages but the tokenizer has no chat template. Set data.chat_template=FILE.jinja"]
            )
        return BadRowError(f"the chat template refused it: {error}")

    def _rewriting_error(self, where: str) -> ConfigError:
        return ConfigError(
            [
                f"the chat template rewrites earlier turns (first seen at {where}), so it cannot be told which tokens "
                "the assistant wrote. Set data.chat_template=FILE.jinja to one that marks them with "
                "{% generation %} … {% endgeneration %} or leaves earlier turns as they are"
            ]
        )

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if eos is None or text.endswith(eos) else text + eos

    # ------------------------------------------------------------------ tokenise

    def _encode_rendered(self, rendered: list[Rendered]) -> list[Encoded]:
        encoded: dict[int, Encoded] = {}
        for add_special_tokens in (True, False):
            group = [i for i, item in enumerate(rendered) if item.add_special_tokens is add_special_tokens]
            if not group:
                continue
            batch = self._tokenise([rendered[i].text for i in group], add_special_tokens)
            prompts = [i for i in group if rendered[i].prompt is not None]
            prompt_ids = self._tokenise([rendered[i].prompt or "" for i in prompts], add_special_tokens)["input_ids"]
            prompt_ids_of = dict(zip(prompts, prompt_ids, strict=True))
            for place, i in enumerate(group):
                mask = self._mask(rendered[i], batch, place, prompt_ids_of.get(i))
                encoded[i] = self._finish(rendered[i], batch["input_ids"][place], mask)
        return [encoded[i] for i in range(len(rendered))]

    def _tokenise(self, texts: list[str], add_special_tokens: bool) -> Any:
        """A BatchEncoding."""
        if not texts:
            return {"input_ids": []}
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)

    def _mask(self, item: Rendered, batch: Any, place: int, prompt_ids: list[int] | None) -> np.ndarray:
        """Which tokens of the row at `place` of a batch bear loss: those that hold any character that does."""
        ids = batch["input_ids"][place]
        mask = np.full(len(ids), item.spans is None)
        if prompt_ids is not None:
            mask[: _common_length(prompt_ids, ids)] = False
        for start, end in item.spans or []:
            if self.tokenizer.is_fast:
                mask[_token_span(batch, place, start, end, len(item.text))] = True
            else:  # a slow tokenizer knows no characters: compare with the tokens of each beginning
                pieces = [item.text[:start], item.text[:end]]
                before, until = self._tokenise(pieces, item.add_special_tokens)["input_ids"]
                mask[_common_length(before, ids) : _common_length(until, ids)] = True
        return mask

    def _finish(self, item: Rendered, ids: list[int], mask: np.ndarray) -> Encoded:
        tokens = np.asarray(ids, dtype=np.int64)
        keep = slice(None)
        if item.add_special_tokens and len(tokens) > 1:  # the text holds the BOS or EOS that the tokenizer adds
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            first = 1 if bos is not None and tokens[0] == tokens[1] == bos else 0
            last = 1 if eos is not None and tokens[-1] == tokens[-2] == eos else 0
            keep = slice(first, len(tokens) - last)
        tokens, mask = tokens[keep], mask[keep]
        mask[:1] = False
        limit = self.max_length
        return Encoded(tokens[:limit], mask[:limit], len(tokens) > limit, item.is_rewritten)


# ---------------------------------------------------------------------- validation


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadRowError(f"{key} must be text (got {type(value).__name__})")
    if not value.strip():
        raise BadRowError(f"{key} is empty")
    return value


def _messages(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = row[key]
    if not isinstance(value, list):
        wanted = "a list of messages" if key == "messages" else "text or a list of messages, like the other one"
        raise BadRowError(f"{key} must be {wanted} (got {type(value).__name__})")
    if not value:
        raise BadRowError(f"{key} is empty")
    return [_message(turn, f"{key}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRowError(f"{name} must be a message with role and content (got {type(turn).__name__})")
    message: dict[str, Any] = {key: value for key, value in turn.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRowError(f"{name}.role must be one of {', '.join(ROLES)} (got {role!r})")
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        return message
    if not isinstance(content, (str, list)):
        raise BadRowError(f"{name}.content must be text (got {type(content).__name__})")
    if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
        raise BadRowError(f"{name}.content must be text or a list of typed parts")
    is_empty = not content.strip() if isinstance(content, str) else not content
    if is_empty and role in ("user", "assistant") and not message.get("tool_calls"):
        raise BadRowError(f"{name}.content is empty")
    return message


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRowError(f"tools is not valid JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRowError(f"tools must be a list (got {type(tools).__name__})")
    return tools or None


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise BadRowError(f"chat_template_kwargs must be a group (got {type(kwargs).__name__})")
    return kwargs


def _is_rewritten(text: str, turns: list[dict[str, Any]]) -> bool:
    """Whether some assistant's words are missing from the text: Qwen's and R1's templates drop `<think>` parts."""
    words = (turn.get("content") for turn in turns if turn["role"] == "assistant")
    return any(isinstance(content, str) and content.strip() not in text for content in words)


def _token_span(batch: Any, place: int, start: int, end: int, length: int) -> slice:
    """The tokens that hold any of the characters [start, end) of a text of `length` characters.

    Asks for single characters, which is far cheaper than all offsets of a long row. A character may have several
    tokens, of which the first is named, or none, where a tokenizer drops white space.
    """

    def first_token(begin: int, stop: int) -> int | None:
        found = (batch.char_to_token(place, character) for character in range(begin, stop))
        return next((token for token in found if token is not None), None)

    first = first_token(start, end)
    if first is None:
        return slice(0, 0)
    after = first_token(end, length)
    if after is None:
        after = len(batch["input_ids"][place])
    last = next(token for c in reversed(range(start, end)) if (token := batch.char_to_token(place, c)) is not None)
    return slice(first, max(after, last + 1))


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    if a[:] == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
