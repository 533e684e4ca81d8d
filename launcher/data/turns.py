"""The turns of a chat, before a template has printed them and beside what it printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from launcher.data.chat_template import Conversation
from launcher.data.normalise import BadRowError, text_of_content

MEND = (
    "Set data.chat_template=FILE.jinja to one that marks the assistant's words with "
    "{% generation %} … {% endgeneration %}"
)


def with_text_arguments(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the arguments of calls as JSON text, which is what DeepSeek's template takes."""
    changed = []
    for turn in turns:
        if calls := turn.get("tool_calls"):
            turn = {**turn, "tool_calls": [
                {**call, "function": {**call["function"], "arguments": as_json(call["function"]["arguments"])}}
                for call in calls
            ]}  # fmt: skip
        changed.append(turn)
    return changed


def other_forms(turns: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The turns, and then in the other forms that some templates take alone.

    With calls' arguments as text (DeepSeek), and with an empty content where a call has none, as the chat completions
    API has it: transformers leaves the key out, and templates that look for it raise an error (DeepSeek, Phi-3).
    """
    yield turns
    yield with_text_arguments(turns)
    if any("content" not in turn for turn in turns):
        filled = [{"content": "", **turn} for turn in turns]
        yield filled
        yield with_text_arguments(filled)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_NUM_WORDS = 8
_NO_WORDS = {
    "role",
    "content",
    "tool_calls",
    "reasoning_content",
    "thinking",
    "reasoning",
    "name",
    "id",
    "tool_call_id",
}
"""Keys of a message that are looked after elsewhere, or that only say which call an answer is for."""


def unused_keys(turns: Iterable[dict[str, Any]], words: frozenset[str]) -> frozenset[str]:
    """Keys of messages that hold something and that the template never names."""
    keys = {
        str(key) for turn in turns for key, value in turn.items() if key not in _NO_WORDS and value not in ("", [], {})
    }
    return frozenset(f"messages[].{key}" for key in keys - words)


def unshown_roles(turns: list[dict[str, Any]], chat: Conversation) -> frozenset[str]:
    """What others than the assistant say and the template does not print: Qwen's know no developer, and of Command R's
    only the header is printed."""
    roles = {
        turn["role"] for turn, pieces in zip(turns, chat.turns, strict=True)
        if turn["role"] != "assistant" and (words := text_of_content(turn.get("content") or "", "content").split())
        and not _is_any_in(words, "".join(chat.text[a:b] for a, b in pieces)) and not _is_any_in(words, chat.text)
    }  # fmt: skip
    return frozenset(f"messages of the role {role} (the chat template does not show them)" for role in roles)


def _is_any_in(words: list[str], text: str) -> bool:
    """Of the first and the last few: a template may cut some out."""
    return any(word in text for word in (*words[:_NUM_WORDS], *words[-_NUM_WORDS:]))


def names_of(tools: list[Any]) -> list[str]:
    named = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [str(tool["name"]) for tool in named if isinstance(tool, dict) and "name" in tool]


def is_empty(turn: dict[str, Any]) -> bool:
    return not turn.get("content") and not turn.get("tool_calls") and not turn.get("reasoning_content")


def refuse_swallowed_turns(turns: list[dict[str, Any]], chat: Conversation, i: int) -> None:
    """Raises: BadRowError, where the template prints a tool's answer as part of the assistant's turn (Gemma 4)."""
    for k in range(i + 1, len(turns)):
        if turns[k]["role"] == "assistant":
            return
        words = text_of_content(turns[k].get("content") or "", "content").strip()
        if not chat.turns[k] and words and any(words in chat.text[a:b] for a, b in chat.turns[i]):
            raise BadRowError(
                f"the chat template prints message {k} ({turns[k]['role']}) inside of the assistant's turn before it, "
                f"so it cannot be told which words are whose. {MEND}"
            )


def is_rewritten(chat: Conversation, turns: list[dict[str, Any]], first: int = 0) -> bool:
    """Whether some of what an assistant says is missing where the template prints it: some drop `<think>` parts, some
    the calls of tools. The same words elsewhere do not count: the name of a tool also stands where it is offered.

    Args:
        first: of the turns that are asked about.
    """
    at = 0  # most templates keep the order: then no part of a text without turns is searched twice
    for turn, pieces in list(zip(turns, chat.turns, strict=True))[first:]:
        if turn["role"] != "assistant":
            continue
        own = "".join(chat.text[start:end] for start, end in pieces)
        for part in filter(None, map(str.strip, _words_of(turn))):
            if own:
                if part not in own:
                    return True
                continue
            found = chat.text.find(part, at)
            if found < 0 and part not in chat.text:
                return True
            at = max(at, found)
    return False


def _words_of(turn: dict[str, Any]) -> Iterator[str]:
    yield turn.get("reasoning_content") or ""
    yield text_of_content(turn.get("content") or "", "content")
    for call in turn.get("tool_calls") or []:
        yield call["function"]["name"]
        yield from _plain_texts(call["function"]["arguments"])


def _plain_texts(value: Any) -> Iterator[str]:
    """The texts in a call's arguments that are the same in every notation."""
    if isinstance(value, str) and value.isalnum():
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _plain_texts(item)
