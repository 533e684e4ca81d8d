"""A row in any of the formats that people have becomes one of ours: messages, prompt + completion, or text.

Understood: `messages`; `prompt` + `completion`; `text`; ShareGPT's `conversations` (from, value); alpaca's
`instruction`, `input`, `output`. `data.columns` gives own names for ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_CALLS = "tool_calls"
ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "function": "tool", "ipython": "tool",
    "function_call": _CALLS, "tool_call": _CALLS,
}  # fmt: skip
"""Names that other formats and trainers have for a role; capital letters do not matter."""
_FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"), ("text",))
"""The columns of each format. Of several that a row has the first counts, unless `data.columns` names one."""
_BESIDE = {
    "messages": ("tools", "chat_template_kwargs"), "prompt": ("tools", "chat_template_kwargs"),
    "conversations": ("tools", "chat_template_kwargs", "system"),
    "instruction": ("tools", "chat_template_kwargs", "system", "input", "history"), "text": (),
}  # fmt: skip
"""What else is read of a row, by the first column of its format."""
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_FLAGS = ("weight", "train", "training", "trainable", "loss")
"""Of a message: whether it is learnt from, in the words of OpenAI, axolotl and ms-swift."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OF_THE_ROW = {"messages", "tools", "documents", "add_generation_prompt"}
"""What a template is given anyway."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRowError(ValueError):
    """This row cannot be used; says why."""


class MissingColumnError(BadRowError):
    """It has no column of a name that `data.columns` gives."""


def normalise(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], frozenset[str]]:
    """The row with our names, and its columns that are not used although they hold something.

    The row has messages, prompt + completion or text, and tools and chat_template_kwargs beside them.

    Args:
        columns: our name → the row's own.

    Raises:
        BadRowError: it has none of the formats, or a part of it is malformed.
    """
    row = {key: value for key, value in _renamed(row, columns).items() if value is not None}
    named = [form for form in _FORMATS if not columns.keys().isdisjoint(form)]
    form = next((form for form in named or _FORMATS if all(key in row for key in form)), None)
    if form is None:
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise BadRowError(
            "has no messages, no prompt + completion, no conversations, no instruction + output and no text "
            f"(it has {found}; own names: data.columns)"
        )
    used = {*form, *_BESIDE[form[0]]}
    names = (key for key in row.keys() - used if key != "")  # a table's numbers of its rows have no name
    unused = frozenset(str(key) for key in names if row[key] not in ("", [], {}))
    if form == ("text",):
        return {"text": row["text"]}, unused
    if media := sorted(unused.intersection(_MEDIA)):
        raise BadRowError(f"has {' and '.join(media)}: only text can be trained on")
    extra: dict[str, Any] = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    if "prompt" in form:
        return {"prompt": row["prompt"], "completion": row["completion"], **extra}, unused
    if "messages" in form:
        return {"messages": _parsed(row["messages"], "messages"), **extra}, unused
    if "conversations" in form:
        turns = _sharegpt(_parsed(row["conversations"], "conversations"), row.get("system"))
        return {"messages": turns, **extra}, unused
    return {"messages": _alpaca(row), **extra}, unused


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            has = ", ".join(map(str, row))
            raise MissingColumnError(f"has no column {theirs!r} (data.columns.{ours} names it; it has {has})")
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
    return messages + [_with_role(turn, f"conversations[{i}]", "a turn with from and value")
                       for i, turn in enumerate(turns)]  # fmt: skip


def _with_role(turn: Any, name: str, wanted: str = "a message with role and content") -> dict[str, Any]:
    """A turn of any chat format as a message of one of our roles; what else it says stays."""
    if not isinstance(turn, dict):
        raise BadRowError(f"{name} must be {wanted} (got {type(turn).__name__})")
    message = {key: value for key, value in turn.items() if value is not None}
    key = "role" if "role" in message or "from" not in message else "from"
    said = message.pop(key, None)
    role = said.strip().lower() if isinstance(said, str) else ""
    role = _OTHER_ROLES.get(role, role)
    if role not in (*ROLES, _CALLS):
        known = ", ".join((*ROLES, *_OTHER_ROLES) if key == "from" else ROLES)
        raise BadRowError(f"{name}.{key} must be one of {known} (got {said!r})")
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if role == _CALLS:
        message = {**message, "tool_calls": message.get("content"), "content": ""}
    elif role == "assistant" and "function_call" in message and not message.get("tool_calls"):
        message["tool_calls"] = [message.pop("function_call")]  # as the chat completions API had it before tools
    return {**message, "role": "assistant" if role == _CALLS else role}


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = [_text_of(row, key) for key in ("instruction", "input") if row.get(key)]
    system = row.get("system")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for pair in _json_text(row.get("history") or [], "history"):
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
    turns = [_with_role(turn, f"{key}[{i}]") for i, turn in enumerate(value)]
    return [_message(turn, f"{key}[{i}]", takes_text) for i, turn in enumerate(turns)]


def _message(message: dict[str, Any], name: str, takes_text: bool) -> dict[str, Any]:
    role = message["role"]
    if "tool_calls" in message:
        message["tool_calls"] = tool_calls(message["tool_calls"], f"{name}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    message = _with_reasoning(message, name)
    has_more = "tool_calls" in message or bool(message.get("reasoning_content"))
    if message.get("content") is None and has_more:
        return message
    content = text_of_content(message.get("content"), f"{name}.content")
    if not content.strip() and role in ("user", "assistant") and not has_more:
        raise BadRowError(f"{name}.content is empty")
    message["content"] = content if takes_text else [{"type": "text", "text": content}]
    return message


def _with_reasoning(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The reasoning under every name that a template may read, as transformers 5.23 hands it to one.

    Raises:
        BadRowError: it is no text, or two names hold two texts.
    """
    given = {key: message[key] for key in _REASONING if key in message}
    for key, value in given.items():
        if not isinstance(value, str):
            raise BadRowError(f"{name}.{key} must be text (got {type(value).__name__})")
    texts = dict.fromkeys(value for value in given.values() if value.strip())
    if len(texts) > 1:
        raise BadRowError(f"{name} has two texts of reasoning: {' and '.join(given)} differ")
    if not given:
        return message
    reasoning = next(iter(texts), "")
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
    if isinstance(arguments, str):  # encoded twice
        arguments = _json_text(arguments, f"{name}.function.arguments (encoded twice)")
        if not isinstance(arguments, dict):
            raise BadRowError(f"{name}.function.arguments must be an object (got {type(arguments).__name__} as text)")
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
    if own := sorted(_OF_THE_ROW & kwargs.keys()):
        raise BadRowError(f"chat_template_kwargs.{own[0]} is given to the template by us; leave it out")
    return kwargs


def takes_part(message: dict[str, Any], name: str) -> bool | None:
    """Whether a message says that it is learnt from; None where it says nothing. Takes the flags out of it.

    Raises:
        BadRowError: a weight other than 0 and 1.
    """
    said = {key: message.pop(key) for key in _FLAGS if key in message}
    said = {key: value for key, value in said.items() if value == value}  # a table's NaN is no value
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            valid = "0 or 1" if key in ("weight", "loss") else "true or false"
            raise BadRowError(f"{name}: {key} must be {valid} (got {value!r})")
    return all(said.values()) if said else None


def without_nulls(value: Any) -> Any:
    """A row of a table format, which gives every object the keys of all others with nulls: without those."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def check_text(text: str) -> None:
    """Raises: BadRowError, where a text holds what no tokenizer can take."""
    if (found := _SURROGATE.search(text)) is not None:
        raise BadRowError(f"holds a lone surrogate (U+{ord(found[0]):04X}), which is no text")
