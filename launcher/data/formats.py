"""A row of a data set becomes tokens and a mask of those that bear loss, in TRL SFTTrainer's formats.

`text` gets an EOS; so does a `completion`; messages go through the chat template, which sets its own ends of turn.
Nothing gets a second BOS or EOS. Loss falls on completions and on assistant turns, unless completion_only_loss=false.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from launcher.base.errors import ConfigError
from launcher.data.answers import Answers
from launcher.data.chat_template import RESERVED, ChatTemplate, Conversation
from launcher.data.normalise import (
    BadRowError,
    check_text,
    messages_of,
    normalise,
    takes_part,
    template_kwargs,
    tools_of,
)
from launcher.data.spans import common_length, spans_at_once, token_span, without
from launcher.data.turns import is_rewritten, names_of, other_forms, unshown_roles, unused_keys

_MANY_SPANS = 32


@dataclass(frozen=True)
class Rendered:
    """A row as text, before it is tokenised."""

    text: str
    add_special_tokens: bool  # plain text only: a chat template writes its own BOS
    prompt: str | None = None  # loss starts where the tokens of `text` leave those of the prompt
    spans: list[tuple[int, int]] | None = None  # characters [start, end) that bear loss; None: all
    is_rewritten: bool = False  # the assistant's words are not in `text` as they were given
    unused: frozenset[str] = frozenset()  # what the row holds and neither we nor its template use


@dataclass(frozen=True)
class Encoded:
    """Tokens of a row, cut to max_length, and which of them bear loss (never the first: nothing predicts it)."""

    tokens: np.ndarray
    mask: np.ndarray
    is_truncated: bool
    is_rewritten: bool
    end_token: int | None = None
    """The special token that ends what was trained on; None where there is none, or it was cut off."""
    unused: frozenset[str] = frozenset()


@dataclass
class Formatter:
    """Validates, renders and tokenises rows.

    Args:
        tokenizer: a PreTrainedTokenizerBase.
        max_length: tokens; longer rows are cut at the end.
        completion_only_loss: None means true where a row has a completion or an assistant.
        loss_on: `all_assistant_turns`, or `last_assistant_turn` of each conversation.
        columns: our names for columns → the rows' own.
        day: what a chat template that asks for the date is told (YYYY-MM-DD); None: today.
    """

    tokenizer: Any
    max_length: int
    completion_only_loss: bool | None
    loss_on: str = "all_assistant_turns"
    columns: dict[str, str] = field(default_factory=dict)
    day: str | None = None
    _template: ChatTemplate | None = field(init=False, default=None)
    _answers: Answers = field(init=False)
    _special_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template:
            self._template = ChatTemplate(self.tokenizer, self.day)
        self.forget()
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset({*added, *self.tokenizer.all_special_ids})

    def encode(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Encoded | BadRowError]:
        """Encodes a batch of (where, row); the answers are in the same order.

        Raises:
            ConfigError: a setting does not fit the data at all (completion_only_loss on text; no chat template).
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

    def forget(self) -> None:
        """Drops what was learnt from earlier rows, so that the next ones do not depend on them."""
        takes_text = self._template is None or self._template.takes_text
        self._answers = Answers(self._chat, takes_text=takes_text, eos=self.tokenizer.eos_token or "")

    # ------------------------------------------------------------------ render

    def _render(self, where: str, row: dict[str, Any]) -> Rendered:
        row, unused = normalise(row, self.columns)
        if "prompt" in row:
            rendered = self._render_completion(row)
        elif "messages" in row:
            rendered = self._render_messages(row)
        else:
            rendered = self._render_text(where, row)
        check_text(rendered.text)
        return replace(rendered, unused=rendered.unused | unused)

    def _render_text(self, where: str, row: dict[str, Any]) -> Rendered:
        if self.completion_only_loss:
            raise ConfigError(
                [
                    f"data.completion_only_loss=true needs messages or prompt + completion, but {where} holds text. "
                    "Set data.completion_only_loss=null (or false)"
                ]
            )
        return Rendered(self._with_eos(_text(row, "text")), add_special_tokens=True)

    def _render_completion(self, row: dict[str, Any]) -> Rendered:
        only = self.completion_only_loss is not False
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            prompt = _text(row, "prompt")
            text = self._with_eos(prompt + _text(row, "completion"))
            return Rendered(text, add_special_tokens=True, prompt=prompt if only else None)
        takes_text = self._chat_template.takes_text
        asked = messages_of(row, "prompt", takes_text=takes_text)
        answer = messages_of(row, "completion", takes_text=takes_text)
        if answer[0]["role"] != "assistant":
            raise BadRowError(f"completion must begin with a turn of the assistant (got {answer[0]['role']})")
        turns = asked + answer
        trained = [takes_part(turn, f"messages[{i}]") for i, turn in enumerate(turns)]
        chat = self._chat(row, turns)
        first = len(asked) if only else 0
        spans = [(self._answers.start(row, turns, chat, first), len(chat.text))] if only else None
        spans = self._without_untrained(row, turns, chat, spans, [None] * first + trained[first:])
        return self._rendered(row, turns, chat, spans, trained, len(asked))

    def _render_messages(self, row: dict[str, Any]) -> Rendered:
        turns = messages_of(row, "messages", takes_text=self._chat_template.takes_text)
        trained = [takes_part(turn, f"messages[{i}]") for i, turn in enumerate(turns)]
        chat = self._chat(row, turns)
        if self.completion_only_loss is False:
            spans = self._without_untrained(row, turns, chat, None, trained)
            return self._rendered(row, turns, chat, spans, trained, 0)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise BadRowError("messages has no assistant turn to learn from")
        chosen = answers[-1:] if self.loss_on == "last_assistant_turn" else answers
        chosen = [i for i in chosen if trained[i] is not False]
        if chat.generated is not None and chosen == answers:
            spans = chat.generated
        else:
            spans = [span for i in chosen for span in self._answers.spans(row, turns, chat, i)]
        return self._rendered(row, turns, chat, spans, trained, 0)

    def _without_untrained(
        self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation,
        spans: list[tuple[int, int]] | None, trained: Sequence[bool | None],
    ) -> list[tuple[int, int]] | None:  # fmt: skip
        """The spans (None: the whole text) without the answers that are not to be learnt."""
        untrained = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and trained[i] is False]
        if not untrained:
            return spans
        holes = [hole for i in untrained for hole in self._answers.spans(row, turns, chat, i)]
        return without([(0, len(chat.text))] if spans is None else spans, holes)

    def _rendered(
        self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation,
        spans: list[tuple[int, int]] | None, trained: Sequence[bool | None], first: int,
    ) -> Rendered:  # fmt: skip
        tools = tools_of(row)
        words = self._chat_template.words(tools)
        unused = unused_keys(turns, words) | unshown_roles(turns, chat)
        unused |= {f"chat_template_kwargs.{key}" for key in template_kwargs(row).keys() - words}
        if any(trained[i] and turn["role"] != "assistant" for i, turn in enumerate(turns)):
            unused |= {"a weight on turns that are not the assistant's"}
        if tools and not all(name in chat.text for name in names_of(tools)):
            unused |= {"tools (the chat template does not show them)"}
        return Rendered(
            chat.text, add_special_tokens=False, spans=spans, is_rewritten=is_rewritten(chat, turns, first),
            unused=unused,
        )  # fmt: skip

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise ConfigError(
                ["the data holds messages but the tokenizer has no chat template. Set data.chat_template=FILE.jinja"]
            )
        return self._template

    def _chat(
        self, row: dict[str, Any], turns: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> Conversation:
        """The rendered conversation, of the turns in the first form that the template takes."""
        tools, kwargs = tools_of(row), template_kwargs(row)
        if RESERVED.search(json.dumps(turns, ensure_ascii=False)):
            raise BadRowError("holds code points that Unicode keeps from being exchanged (U+FDD0 to U+FDD4)")
        problem: Exception | None = None
        for attempt in other_forms(turns):
            try:
                return self._chat_template.render(attempt, tools, kwargs, add_generation_prompt=add_generation_prompt)
            except Exception as error:  # templates are programs: whatever one raises, it refused this row
                problem = problem or error
        raise BadRowError(f"the chat template refused it: {problem}") from problem

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
        with _as_it_came(self.tokenizer):
            batch = self.tokenizer(
                texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
            )
        return batch

    def _mask(self, item: Rendered, batch: Any, place: int, prompt_ids: list[int] | None) -> np.ndarray:
        """Which tokens of the row at `place` of a batch bear loss: those that hold any character that does."""
        ids = batch["input_ids"][place]
        mask = np.full(len(ids), item.spans is None)
        if prompt_ids is not None:
            mask[: common_length(prompt_ids, ids)] = False
        spans = item.spans or []
        is_fast = self.tokenizer.is_fast
        find = spans_at_once(batch, place, len(item.text)) if is_fast and len(spans) > _MANY_SPANS else None
        for start, end in spans:
            if find is not None:
                mask[find(start, end)] = True
            elif is_fast:
                mask[token_span(batch, place, start, end, len(item.text))] = True
            else:  # a slow tokenizer knows no characters: compare with the tokens of each beginning
                pieces = [item.text[:start], item.text[:end]]
                before, until = self._tokenise(pieces, item.add_special_tokens)["input_ids"]
                mask[common_length(before, ids) : common_length(until, ids)] = True
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
        is_cut = len(tokens) > limit
        tokens, mask = tokens[:limit], mask[:limit]
        end_token = None if is_cut else self._end_token(tokens, mask)
        return Encoded(tokens, mask, is_cut, item.is_rewritten, end_token, item.unused)

    def _end_token(self, tokens: np.ndarray, mask: np.ndarray) -> int | None:
        """The special token near the end of what bears loss: only white space may follow it there."""
        labelled = tokens[mask]
        for k in range(1, min(3, len(labelled)) + 1):
            token = int(labelled[-k])
            if token in self._special_ids:
                return token
            if self.tokenizer.decode([token]).strip():
                return None
        return None


@contextlib.contextmanager
def _as_it_came(tokenizer: Any) -> Iterator[None]:
    """A call takes out of a tokenizer what its file says of cutting and padding (transformers,
    set_truncation_and_padding). Checkpoints of a run that had to tokenise would not have it, those of one that found
    its data in the cache would."""
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    truncation, padding = (backend.truncation, backend.padding) if backend is not None else (None, None)
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadRowError(f"{key} must be text (got {type(value).__name__})")
    if not value.strip():
        raise BadRowError(f"{key} is empty")
    return value
