"""A row in any of the formats that people have becomes one of ours: messages, prompt + completion, or text.

Understood: `messages`; `prompt` + `completion`; `text`; ShareGPT's `conversations` (from, value); alpaca's
`instruction`, `input`, `output`. `data.columns` gives own names for ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
    "function_call": "tool_calls", "tool_call": "tool_calls",
}  # fmt: skip
COLUMNS = (
    "messages", "prompt", "completion", "text", "conversations", "instruction", "input", "output", "system", "tools",
    "chat_template_kwargs",
)  # fmt: skip
"""Names of ours that `data.columns` may give to a column of another name."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRowError(ValueError):
    """This row cannot be used; says why."""


def normalise(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with our names: messages, prompt + completion or text, and tools and chat_template_kwargs beside them.

    Args:
        columns: our name → the row's own.

    Raises:
        BadRowError: it has none of the formats, or a part of it is malformed.
    """
    row = {key: value for key, value in _renamed(row, columns).items() if value is not None}
    extra: dict[str, Any] = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    if "prompt" in row and "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"], **extra}
    if "messages" in row:
        return {"messages": _parsed(row["messages"], "messages"), **extra}
    if "conversations" in row:
        return {"messages": _sharegpt(_parsed(row["conversations"], "conversations"), row.get("system")), **extra}
    if "instruction" in row and "output" in row:
        return {"messages": _alpaca(row), **extra}
    if "text" in row:
        return {"text": row["text"]}
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise BadRowError(
        "has no messages, no prompt + completion, no conversations, no instruction + output and no text "
        f"(it has {found}; own names: data.columns)"
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise BadRowError(f"has no column {missing[0]!r} (data.columns names it; it has {', '.join(map(str, row))})")
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken} | {k: row[v] for k, v in columns.items()}


def _parsed(value: Any, key: str) -> Any:
    """A list of messages that was stored as JSON text (CSV holds nothing else)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{key} must be a list of messages (got text that is no JSON: {error})") from error


def _sharegpt(turns: Any, system: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise BadRowError(f"conversations must be a list of turns (got {type(turns).__name__})")
    messages: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRowError(f"conversations[{i}] must be a turn with from and value (got {type(turn).__name__})")
        if "from" not in turn and "role" in turn:
            messages.append(turn)
            continue
        role = _SHAREGPT_ROLES.get(turn.get("from"))  # type: ignore[arg-type]
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise BadRowError(f"conversations[{i}].from must be one of {known} (got {turn.get('from')!r})")
        kept = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
        if role == "tool_calls":
            messages.append({"role": "assistant", "content": "", "tool_calls": turn.get("value"), **kept})
        else:
            messages.append({"role": role, "content": turn.get("value"), **kept})
    return messages


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = [_text_of(row, key) for key in ("instruction", "input") if row.get(key)]
    system = row.get("system")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("history must hold pairs of an instruction and an answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(part for part in parts if part.strip())
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _text_of(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadRowError(f"{key} must be text (got {type(value).__name__})")
    return value


# ---------------------------------------------------------------------- messages


def messages_of(row: Mapping[str, Any], key: str, *, takes_text: bool) -> list[dict[str, Any]]:
    """The messages under a key as a chat template wants them.

    Args:
        takes_text: whether the template takes text as content, else a list of parts.

    Raises:
        BadRowError: one is malformed, or holds something else than text.
    """
    value = row[key]
    if not isinstance(value, list):
        wanted = "a list of messages" if key == "messages" else "text or a list of messages, like the other one"
        raise BadRowError(f"{key} must be {wanted} (got {type(value).__name__})")
    if not value:
        raise BadRowError(f"{key} is empty")
    return [_message(turn, f"{key}[{i}]", takes_text) for i, turn in enumerate(value)]


def _message(turn: Any, name: str, takes_text: bool) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRowError(f"{name} must be a message with role and content (got {type(turn).__name__})")
    message: dict[str, Any] = {key: value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise BadRowError(f"{name}.role must be one of {', '.join(ROLES)} (got {role!r})")
    if "tool_calls" in message:
        message["tool_calls"] = tool_calls(message["tool_calls"], f"{name}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    for key in ("reasoning_content", "thinking"):
        if key in message and not isinstance(message[key], str):
            raise BadRowError(f"{name}.{key} must be text (got {type(message[key]).__name__})")
    has_more = "tool_calls" in message or bool(message.get("reasoning_content"))
    if message.get("content") is None and has_more:
        return message
    content = text_of_content(message.get("content"), f"{name}.content")
    if not content.strip() and role in ("user", "assistant") and not has_more:
        raise BadRowError(f"{name}.content is empty")
    message["content"] = content if takes_text else [{"type": "text", "text": content}]
    return message


def text_of_content(content: Any, name: str) -> str:
    """The text of a message's content: itself, or its text parts one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRowError(f"{name} must be text or a list of text parts (got {type(content).__name__})")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in ("text", "input_text", "output_text"):
            raise BadRowError(f"{name}[{i}] is a part of type {kind}: only text parts can be trained on")
        if not isinstance(part.get("text"), str):
            raise BadRowError(f"{name}[{i}].text must be text (got {type(part.get('text')).__name__})")
        texts.append(part["text"])
    return "".join(texts)


def tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: templates encode them; text would be encoded twice."""
    calls = _json_text(value, name)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise BadRowError(f"{name} must be a list of calls (got {type(calls).__name__})")
    return [_tool_call(_json_text(call, f"{name}[{i}]"), f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRowError(f"{name} must be a call with a function (got {type(call).__name__})")
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function")
    if not isinstance(function, dict):
        function = {key: call.pop(key) for key in ("name", "arguments", "parameters") if key in call}
        if "parameters" in function:
            function.setdefault("arguments", function.pop("parameters"))
    if not isinstance(function.get("name"), str):
        raise BadRowError(f"{name}.function.name must be text (got {function.get('name')!r})")
    arguments = function.get("arguments", {})
    arguments = {} if arguments == "" else _json_text(arguments, f"{name}.function.arguments")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _json_text(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{name} is not valid JSON: {error}") from error


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools that the row offers: a list, its JSON text, or a list of JSON texts."""
    tools = _json_text(row.get("tools"), "tools") if row.get("tools") != "" else None
    if tools is not None and not isinstance(tools, list):
        raise BadRowError(f"tools must be a list (got {type(tools).__name__})")
    return [_json_text(tool, f"tools[{i}]") for i, tool in enumerate(tools)] if tools else None


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs") or {}
    kwargs = _json_text(kwargs, "chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise BadRowError(f"chat_template_kwargs must be a group (got {type(kwargs).__name__})")
    return kwargs


def takes_part(message: dict[str, Any], name: str) -> bool:
    """Whether a message is learnt from; takes `weight` and `train` out of it.

    Raises:
        BadRowError: a weight other than 0 and 1.
    """
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (True, False):
        raise BadRowError(f"{name}: weight must be 0 or 1, train true or false (got {weight!r}, {train!r})")
    return bool(weight) and bool(train)


def without_nulls(value: Any) -> Any:
    """A row of a table format, which gives every object the keys of all others with nulls: without those."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def check_text(text: str) -> None:
    """Raises: BadRowError, where a text holds what no tokenizer can take."""
    if (found := _SURROGATE.search(text)) is not None:
        raise BadRowError(f"holds a lone surrogate (U+{ord(found[0]):04X}), which is no text")
