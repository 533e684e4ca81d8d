"""Which characters of a rendered conversation the assistant is to write."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

from launcher.data.chat_template import Conversation, kwargs_key
from launcher.data.normalise import BadRowError, template_kwargs
from launcher.data.spans import common_length, within
from launcher.data.turns import MEND, is_empty, refuse_swallowed_turns


class Chat(Protocol):
    def __call__(
        self, row: dict[str, Any], turns: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> Conversation:
        """Raises: BadRowError, where the template refuses the turns."""


@dataclass(frozen=True)
class Frame:
    """What a template prints around an answer to a question: before it, as a generation prompt does, and behind it."""

    header: str
    tail: str


class Answers:
    """Remembers what a template prints around answers, for rows that are alike.

    Args:
        chat: renders turns with the tools and settings of a row.
        takes_text: the template takes a content that is plain text.
        eos: the tokenizer's.
    """

    def __init__(self, chat: Chat, *, takes_text: bool, eos: str) -> None:
        self._chat, self._takes_text, self._eos = chat, takes_text, eos
        self._headers: dict[tuple[str, ...], str] = {}
        self._frames: dict[tuple[str, ...], Frame] = {}

    def spans(
        self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int
    ) -> list[tuple[int, int]]:
        """The characters of turn i that the model is to write: without the header that a generation prompt holds.

        Raises:
            BadRowError: it cannot be told which these are.
        """
        pieces = chat.turns[i]
        if chat.generated is not None:
            return [part for low, high in pieces for part in within(chat.generated, low, high)]
        if not pieces:
            return [] if is_empty(turns[i]) else [self._span_by_prefix(row, turns, chat, i)]
        refuse_swallowed_turns(turns, chat, i)
        if i == len(turns) - 1 and pieces[-1][1] == max(end for own in chat.turns for _, end in own):
            # What comes after the loop: Phi-3's EOS.
            pieces = [*pieces[:-1], (pieces[-1][0], len(chat.text))]
        end = self._end_of(row, turns, chat, i, pieces[0][1])
        spans = [(self.start(row, turns, chat, i), end), *pieces[1:]]
        tail, (low, high) = self._frame(row).tail, spans[-1]
        if tail and chat.text.startswith(tail, high):  # Jamba's <|eom|> is printed when the loop is at the next message
            spans[-1] = low, high + len(tail)
        return spans

    def start(self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int) -> int:
        """Where the model begins to write turn i: behind what a generation prompt holds of it.

        Raises:
            BadRowError: it cannot be told.
        """
        if not chat.turns[i]:
            return self._span_by_prefix(row, turns, chat, i)[0]
        start, end = chat.turns[i][0]
        text, header = chat.text[start:end], self._header(row, turns, chat, i)
        if not header or not text.startswith(header):
            # DiffusionGemma's prompt leaves out after a tool what it prints in the conversation; some print it always.
            usual = self._frame(row).header
            header = usual if text.startswith(usual) else header
        return start + common_length(header, text)

    def _end_of(self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int, end: int) -> int:
        """Where the model ends what it writes first of turn i.

        Gemma 4's answers of tools follow inside of the turn, and the mark that they begin with is what it stops at.
        """
        if i + 1 in chat.inner:
            until = self._chat(row, turns[: i + 1]).text
            if chat.text.startswith(until):
                return max(end, len(until))
        return end

    def _span_by_prefix(
        self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int
    ) -> tuple[int, int]:
        """For a template that has no loop over the messages: between the prompt for turn i and the text with it.

        Raises:
            BadRowError: the conversation's beginning is rendered otherwise once more follows.
        """
        asked = self._chat(row, turns[:i], add_generation_prompt=True).text if i else ""
        until = self._chat(row, turns[: i + 1]).text
        if not chat.text.startswith(until):
            until = until.removesuffix(self._eos)
        if not chat.text.startswith(until):
            raise BadRowError(
                "the chat template rewrites earlier turns and has no loop over the messages, so it cannot be told "
                f"where message {i} is. {MEND}"
            )
        return common_length(asked, chat.text), len(until)

    def _header(self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int) -> str:
        """What the template prints to ask for turn i: the same after every turn of one role."""
        key = (turns[i - 1]["role"] if i else "", *_frame_key(row))
        if key not in self._headers:
            try:
                self._headers[key] = self._new_header(row, turns, chat, i)
            except BadRowError:  # some templates refuse a conversation that ends there
                return self._frame(row).header
        return self._headers[key]

    def _new_header(self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation, i: int) -> str:
        asked = turns[:i] or [{"role": "user", "content": turns[i].get("content") or "?"}]
        prompt = self._chat(row, asked, add_generation_prompt=True).text
        plain = self._chat(row, asked).text.removesuffix(self._eos)  # Phi-3's
        start = chat.turns[i][0][0]
        is_beginning = i > 0 and prompt[:start] == chat.text[:start]
        return prompt[start:] if is_beginning else prompt[common_length(plain, prompt) :]

    def _frame(self, row: dict[str, Any]) -> Frame:
        """Of the shortest conversation, so that it does not depend on the rows that came before."""
        key = _frame_key(row)
        if key not in self._frames:
            content: Any = "?" if self._takes_text else [{"type": "text", "text": "?"}]
            turns = [{"role": role, "content": content} for role in ("user", "assistant", "user")]
            header = tail = ""
            with contextlib.suppress(BadRowError):
                chat = self._chat(row, turns[:2])
                if chat.turns[1]:
                    header = self._new_header(row, turns[:2], chat, 1)
                    tail = self._tail(row, turns, chat)
            self._frames[key] = Frame(header, tail)
        return self._frames[key]

    def _tail(self, row: dict[str, Any], turns: list[dict[str, Any]], chat: Conversation) -> str:
        """What follows an answer whether it is the last turn or not. What only ends the text does not count: Phi-3's
        EOS, the next header of Command A, which prints it even where none is asked for."""
        tail = chat.text[chat.turns[1][-1][1] :]
        if not tail.strip():
            return ""
        longer = self._chat(row, turns)
        return tail if longer.turns[1] and longer.text.startswith(tail, longer.turns[1][-1][1]) else ""


def _frame_key(row: dict[str, Any]) -> tuple[str, str]:
    """What headers depend on, beside the role before."""
    return kwargs_key(template_kwargs(row)), str(bool(row.get("tools")))
