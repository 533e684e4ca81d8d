"""The stock chat templates of thirty model families: right spans, or a named refusal of that row alone.

TRL ships them (`trl/chat_templates`), beside variants for training of its own that mark the assistant's words with
`{% generation %}`. Where both render the same text, what bears loss is compared with those.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.data.chat_template import ChatTemplate
from launcher.data.formats import Encoded, Formatter
from launcher.data.normalise import BadRowError
from launcher.data.spans import common_length
from launcher.data.tokenizer import byte_tokenizer

_SPEC = importlib.util.find_spec("trl")
assert _SPEC is not None and _SPEC.origin is not None, "trl is a development dependency"
FOLDER = Path(_SPEC.origin).with_name("chat_templates")
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "add", "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}  # fmt: skip
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 17}}}
_TOOL_TURN = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "RESULT"}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def think(reasoning: str, answer: str) -> dict[str, Any]:
    return assistant(f"<think>\n{reasoning}\n</think>\n\n{answer}")


_TWO_TURNS = [user("Q1"), assistant("ANS1"), user("Q2"), assistant("ANS2")]
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("Q1"), assistant("ANS1")]},
    "multi": {"messages": [*_TWO_TURNS, user("Q3"), assistant("ANS3")]},
    "system": {"messages": [{"role": "system", "content": "SYS"}, *_TWO_TURNS]},
    "think": {"messages": [user("Q1"), think("R1", "ANS1"), user("Q2"), think("R2", "ANS2")]},
    "tool": {
        "messages": [user("Q1"), assistant("", tool_calls=[_CALL]), _TOOL_TURN, assistant("ANS2")], "tools": [TOOL],
    },
    "parts": {
        "messages": [{"role": "user", "content": parts("Q1")}, {"role": "assistant", "content": parts("AN", "S1")}],
    },
}  # fmt: skip
HEADERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|assistant|>", "<|START_OF", "<|start|>")
REFUSED = {
    ("cohere", "tool"), ("cohere2", "tool"), ("gemma", "tool"), ("gemma", "system"), ("gemma3", "tool"),
    ("llava_next", "tool"),
}  # fmt: skip
"""By the template itself, with an error of its own."""


@functools.cache
def formatter(name: str) -> Formatter:
    return Formatter(with_template(name), 100_000, None)


def with_template(name: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    # DeepSeek's, written with a wide bar: one token each, as in its own tokenizer.
    marks = sorted(set(re.findall("<\uff5c[\\w\u2581]+\uff5c>", tokenizer.chat_template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def encode(name: str, row: dict[str, Any]) -> Encoded:
    (encoded,) = formatter(name).encode([("rows.jsonl:1", row)])
    if not isinstance(encoded, Encoded):
        raise encoded
    return encoded


def labelled(name: str, encoded: Encoded) -> list[str]:
    """The text that bears loss, run by run."""
    runs: list[list[int]] = [[]]
    for token, has_loss in zip(encoded.tokens.tolist(), encoded.mask.tolist(), strict=True):
        if has_loss:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [formatter(name).tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_what_bears_loss_is_the_assistants_part_of_the_rendered_conversation(name: str, case: str) -> None:
    try:
        encoded = encode(name, ROWS[case])
    except BadRowError as refusal:
        assert (name, case) in REFUSED, str(refusal)
        return
    assert (name, case) not in REFUSED
    found, whole = labelled(name, encoded), formatter(name).tokenizer.decode(encoded.tokens)
    text = "".join(found)
    for foreign in ("Q1", "Q2", "Q3", "SYS", "RESULT"):
        assert foreign not in text, f"{foreign} is learnt: {found}"
    for own in ("ANS1", "ANS2", "ANS3", "R1", "R2"):
        assert text.count(own) == whole.count(own), f"{own} is not learnt: {found}"
    last = "ANS1" if case in ("single", "parts") else "ANS3" if case == "multi" else "ANS2"
    assert last in found[-1]
    assert not any(run.startswith(HEADERS) for run in found), found
    if case == "tool" and "17" in whole.partition("RESULT")[0].rpartition("Q1")[2]:
        assert "17" in found[0], "the call is not learnt"


@pytest.mark.parametrize("case", [case for case in ROWS if case != "parts"])
@pytest.mark.parametrize("name", [n for n in NAMES if (FOLDER / f"{n}_training.jinja").is_file()])
def test_spans_are_those_of_trls_training_template_when_both_render_the_same(name: str, case: str) -> None:
    marked = f"{name}_training"
    try:
        ours, theirs = encode(name, ROWS[case]), encode(marked, ROWS[case])
    except BadRowError:
        return
    if ours.tokens.tolist() != theirs.tokens.tolist():
        return  # theirs keeps the reasoning of earlier turns
    runs, others = labelled(name, ours), labelled(marked, theirs)
    assert len(runs) == len(others)
    for own, other in zip(runs, others, strict=True):
        # Theirs counts some headers that a generation prompt holds already; a trailing line break may differ; theirs
        # leaves out the mark that a call ends with where the answer follows, though not where nothing follows.
        assert other.strip().endswith(own.strip().removesuffix("<|tool_response>")), (runs, others)


_CALLED = "<|tool_call>call:add{a:17}<tool_call|>"
_SAID = {"gemma4_v5": ["SAYANS2<turn|>\n"], "diffusion_gemma": ["SAY", "ANS2<turn|>\n"]}
_TRACES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "call at the end": (ROWS["tool"]["messages"][:2], [f"{_CALLED}<|tool_response>"]),
    "answer at the end": (ROWS["tool"]["messages"][:3], [f"{_CALLED}<|tool_response>"]),
    "two answers": (
        [*ROWS["tool"]["messages"][:2], _TOOL_TURN, {**_TOOL_TURN, "content": "RESULT2"}, assistant("ANS2")],
        [f"{_CALLED}<|tool_response>", "ANS2<turn|>\n"],
    ),
    "two calls": (
        [*ROWS["tool"]["messages"][:3], *ROWS["tool"]["messages"][1:], user("Q2"), assistant("ANS3")],
        [f"{_CALLED}<|tool_response>", f"{_CALLED}<|tool_response>", "ANS2<turn|>\n", "ANS3<turn|>\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _TRACES)
@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"])
def test_answers_of_tools_bear_no_loss_when_the_template_prints_them_inside_of_the_assistants_turn(
    name: str, case: str
) -> None:
    messages, expected = _TRACES[case]
    assert labelled(name, encode(name, {"messages": messages, "tools": [TOOL]})) == expected


@pytest.mark.parametrize("name", _SAID)
def test_words_after_an_answer_are_the_assistants_when_they_belong_to_the_call(name: str) -> None:
    """The template puts what was said with a call behind the call's answer."""
    messages = [user("Q1"), assistant("SAY", tool_calls=[_CALL]), _TOOL_TURN, assistant("ANS2")]
    assert labelled(name, encode(name, {"messages": messages, "tools": [TOOL]})) == [_CALLED, *_SAID[name]]


def test_an_untrained_call_bears_no_loss_and_its_answer_neither() -> None:
    call = {**assistant("", tool_calls=[_CALL]), "weight": 0}
    messages = [user("Q1"), call, _TOOL_TURN, assistant("ANS2")]
    assert labelled("gemma4_v5", encode("gemma4_v5", {"messages": messages, "tools": [TOOL]})) == ["ANS2<turn|>\n"]


COMPLETIONS: dict[str, dict[str, Any]] = {
    "single": {"prompt": [user("Q1")], "completion": [assistant("ANS1")]},
    "after turns": {"prompt": _TWO_TURNS[:3], "completion": _TWO_TURNS[3:]},
    "several": {"prompt": _TWO_TURNS[:1], "completion": _TWO_TURNS[1:]},
    "think": {"prompt": [user("Q1")], "completion": [think("R1", "ANS1")]},
    "reasoning": {"prompt": [user("Q1")], "completion": [assistant("ANS1", reasoning="R1")]},
    "tool": {
        "prompt": [user("Q1")], "completion": [assistant("", tool_calls=[_CALL]), _TOOL_TURN, assistant("ANS2")],
        "tools": [TOOL],
    },
    "not thinking": {
        "prompt": [user("Q1")], "completion": [assistant("ANS1")], "chat_template_kwargs": {"enable_thinking": False},
    },
}  # fmt: skip
TAKES_PARTS = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.jinja"))])
def test_a_completion_of_messages_bears_loss_where_trls_does(name: str) -> None:
    """From where the prompt's tokens, with the generation prompt, and those of the whole differ; tags do not matter."""
    tokenizer = formatter(name).tokenizer
    num_compared = 0
    for case, row in COMPLETIONS.items():
        given = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        try:
            asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False, **given)
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False, **given)
        except Exception:  # whatever a template raises
            continue
        found = encode(name, row)
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
        if found.tokens.tolist() != ids and name.startswith(TAKES_PARTS):
            continue  # the text of a Python list, or nothing
        assert found.tokens.tolist() == ids, case
        num_prompt = common_length(before, ids)
        assert found.mask.tolist() == [False] * num_prompt + [True] * (len(ids) - num_prompt), case
        num_compared += 1
    assert num_compared >= 4 or name.startswith(TAKES_PARTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_one_that_transformers_renders(name: str) -> None:
    tokenizer = formatter(name).tokenizer
    template = ChatTemplate(tokenizer)
    turns = [dict(turn) for turn in ROWS["multi"]["messages"]]
    if not template.takes_text:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert template.render(turns).text == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("name", ["deepseekv3", "qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4_v5"])
def test_a_call_without_content_is_what_it_is_with_an_empty_one(name: str) -> None:
    """The chat completions API writes null there."""
    plain = ROWS["tool"]
    call = {**plain["messages"][1], "content": None}
    row = {**plain, "messages": [plain["messages"][0], call, *plain["messages"][2:]]}
    assert encode(name, row).tokens.tolist() == encode(name, plain).tokens.tolist()
    assert labelled(name, encode(name, row)) == labelled(name, encode(name, plain))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("qwen3", "developer"),
        ("qwen2_5", "developer"),
        ("glm4moe", "developer"),
        ("gptoss", "system"),
        ("cohere2", "developer"),
    ],
)
def test_what_others_say_is_named_when_the_template_does_not_show_it(name: str, role: str) -> None:
    turns = [
        {"role": "system", "content": "RULES"},
        {"role": role, "content": "UNSHOWN"},
        user("Q1"),
        assistant("ANS1"),
    ]
    found = encode(name, {"messages": turns})
    assert "UNSHOWN" not in formatter(name).tokenizer.decode(found.tokens)
    assert found.unused == {f"messages of the role {role} (the chat template does not show them)"}
    assert encode("llama3_1", {"messages": turns}).unused == frozenset()


@pytest.mark.parametrize("name", ["phi3", "qwen2_5", "llama3_1", "deepseekv3", "glm4moe"])
def test_a_header_is_no_part_of_an_answer_when_the_conversation_begins_with_one(name: str) -> None:
    turns = [assistant("ANS1"), user("Q1"), assistant("ANS2")]
    first, second = labelled(name, encode(name, {"messages": turns}))
    assert first.partition("ANS1")[0] == second.partition("ANS2")[0]


def test_labels_do_not_depend_on_the_rows_before_and_no_header_is_learnt() -> None:
    """DiffusionGemma prints what was said with a call behind the call's answer, where its own prompt ends otherwise."""
    turns = [user("Q1"), assistant("SAY", tool_calls=[_CALL]), _TOOL_TURN, assistant("ANS2"), user("Q2"),
             assistant("ANS3")]  # fmt: skip
    row = {"messages": turns, "tools": [TOOL]}
    alone = Formatter(with_template("diffusion_gemma"), 100_000, None).encode([("rows.jsonl:1", row)])[0]
    rows = [("rows.jsonl:1", ROWS["tool"]), ("rows.jsonl:2", row)]
    after_another = Formatter(with_template("diffusion_gemma"), 100_000, None).encode(rows)[1]
    assert isinstance(alone, Encoded) and isinstance(after_another, Encoded)
    assert alone.mask.tolist() == after_another.mask.tolist()
    assert labelled("diffusion_gemma", alone) == [_CALLED, "SAY", "ANS2<turn|>\n", "ANS3<turn|>\n"]
