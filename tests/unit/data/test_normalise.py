"""Formats that people have: each row's tokens and mask are those of the same row in ours."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.base.errors import DataError
from launcher.data.formats import Encoded, Formatter
from launcher.data.normalise import BadRowError
from launcher.data.sources import FileSource, rows_of
from launcher.data.tokenizer import byte_tokenizer

from .conftest import chat

TOKENIZER = byte_tokenizer()
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encode(row: dict[str, Any], *, template: str | None = None, only: bool | None = None, **settings: Any) -> Encoded:
    tokenizer = byte_tokenizer() if template else TOKENIZER
    if template:
        tokenizer.chat_template = template
    (result,) = Formatter(tokenizer, 10_000, only, **settings).encode([("rows.jsonl:1", row)])
    if not isinstance(result, Encoded):
        raise result
    return result


def text(encoded: Encoded) -> str:
    return str(TOKENIZER.decode(encoded.tokens))


def learnt(encoded: Encoded) -> str:
    return str(TOKENIZER.decode(encoded.tokens[encoded.mask]))


SAME_AS_CHAT: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}], "messages": None},
    {"instruction": "hi", "input": "", "output": "yo"},
    {"instruction": "hi", "output": "yo"},
    {"messages": json.dumps(chat("hi", "yo")["messages"])},
    {"conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT ", "value": "yo"}]},
    {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"messages": [{"role": "User", "content": "hi"}, {"role": "model", "content": "yo"}]},
    {"instruction": None, "input": None, "output": None, "messages": chat("hi", "yo")["messages"], "id": 7},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "gpt", "content": "yo"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                  {"role": "assistant", "content": [{"text": "yo"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("row", SAME_AS_CHAT)
def test_row_is_read_as_a_chat_when_it_comes_in_another_format(row: dict[str, Any]) -> None:
    ours, theirs = encode(chat("hi", "yo")), encode(row)
    assert theirs.tokens.tolist() == ours.tokens.tolist() and theirs.mask.tolist() == ours.mask.tolist()


def test_system_input_and_history_are_part_of_an_alpaca_row() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]}
    found = encode(row)
    assert (
        text(found)
        == "<|system|>s<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>add\n1 2<|end|><|assistant|>3<|end|>"
    )
    assert learnt(found) == "b<|end|>3<|end|>"


def test_history_of_an_alpaca_row_is_read_when_it_is_json_text() -> None:
    row = {"instruction": "c", "output": "d", "history": '[["a", "b"]]'}
    assert text(encode(row)) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>"


def test_a_named_column_wins_when_the_row_has_another_format_too() -> None:
    row = {**chat("hi", "yo"), "body": "abc", "question": "1+1=", "answer": "2"}
    assert text(encode(row, columns={"text": "body"})) == "abc<|end|>"
    assert learnt(encode(row, columns={"prompt": "question", "completion": "answer"})) == "2<|end|>"
    assert text(encode(row)) == text(encode(chat("hi", "yo")))


def test_own_column_names_are_used_when_they_are_given() -> None:
    row = {"dialogue": chat("hi", "yo")["messages"], "messages": "of something else"}
    assert encode(row, columns={"messages": "dialogue"}).tokens.tolist() == encode(chat("hi", "yo")).tokens.tolist()
    with pytest.raises(BadRowError, match=r"no column 'dialogue'.*data\.columns"):
        encode({"text": "x"}, columns={"messages": "dialogue"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "image", "url": "x"}], r"messages\[0\]\.content\[0\] is a part of type image"),
        ([{"type": "text"}], r"content\[0\]\.text must be text"), ([3], "type int"), ({"a": 1}, "must be text or a"),
    ],
)  # fmt: skip
def test_other_parts_than_text_are_refused(content: Any, problem: str) -> None:
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yo"}]}
    with pytest.raises(BadRowError, match=problem):
        encode(row)


# ---------------------------------------------------------------------- what bears loss


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_message_is_not_learnt_when_it_says_so(mark: dict[str, Any]) -> None:
    row = chat("q1", "bad", "q2", "good")
    row["messages"][1] |= mark
    assert learnt(encode(row)) == "good<|end|>"
    with pytest.raises(BadRowError, match="weight must be 0 or 1"):
        encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]})


@pytest.mark.parametrize("mark", [{"training": False}, {"loss": 0}, {"weight": 1, "train": False}])
def test_an_answer_is_left_out_of_every_kind_of_loss_when_it_says_so(mark: dict[str, Any]) -> None:
    """Also out of a completion of several turns, and where all of the text is learnt otherwise."""
    turns = chat("q1", "bad", "q2", "good")["messages"]
    turns[1] |= mark
    everything = "<|user|>q1<|end|><|assistant|>bad<|end|><|user|>q2<|end|><|assistant|>good<|end|>"
    assert text(encode({"messages": turns})) == everything
    assert learnt(encode({"messages": turns})) == "good<|end|>"
    assert learnt(encode({"messages": turns}, only=False)) == everything[8:].replace("bad<|end|>", "")
    row = {"prompt": turns[:1], "completion": turns[1:]}
    assert learnt(encode(row)) == "<|user|>q2<|end|><|assistant|>good<|end|>"
    for template in (TOOL_TEMPLATE, None):  # without and with generation tags
        assert learnt(encode({"messages": turns}, template=template)) == "good<|end|>"


def test_nothing_is_learnt_when_the_last_answer_is_not_to_be_and_only_it_was_chosen() -> None:
    row = chat("q1", "first", "q2", "last")
    row["messages"][3]["weight"] = 0
    assert learnt(encode(row, loss_on="last_assistant_turn")) == ""


def test_a_completion_is_refused_when_the_assistant_does_not_begin_it() -> None:
    turn = {"role": "user", "content": "q"}
    with pytest.raises(BadRowError, match="completion must begin with a turn of the assistant"):
        encode({"prompt": [turn], "completion": [turn]})


def test_only_the_last_answer_is_learnt_when_loss_on_says_so() -> None:
    row = chat("q1", "first", "q2", "last")
    assert learnt(encode(row)) == "first<|end|>last<|end|>"
    assert learnt(encode(row, loss_on="last_assistant_turn")) == "last<|end|>"


def test_the_token_that_ends_a_turn_is_known() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert encode(chat("hi", "yo")).end_token == end and encode({"text": "abc"}).end_token == end
    endless = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    assert encode(chat("hi", "yo"), template=endless).end_token is None


# ---------------------------------------------------------------------- what has no effect is said


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (chat("hi", "yo"), set()),
        ({**chat("hi", "yo"), "id": 3, "system": "s", "source": "", "scores": []}, {"id", "system"}),
        ({"text": "a", "url": "x", "image": "a.png"}, {"url", "image"}),
        ({"instruction": "a", "output": "b", "text": "Below is …"}, {"text"}),
        ({**chat("hi", "yo"), "tools": [{"type": "function", "function": {"name": "add"}}]},
         {"tools (the chat template does not show them)"}),
        ({"messages": [{"role": "user", "content": "a", "refusal": None, "masked": 0, "weight": 0},
                       {"role": "assistant", "content": "b", "name": "c", "train_detail": [1]}]},
         {"messages[].masked", "messages[].train_detail"}),
        ({"messages": [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]},
         {"a weight on turns that are not the assistant's"}),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_known(row: dict[str, Any], unused: set[str]) -> None:
    assert encode(row).unused == unused


def test_a_key_of_messages_is_not_named_when_the_template_uses_it() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.mood }}<|end|>{% endfor %}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "mood": "glad"}]}
    assert encode(row, template=template).unused == set() and encode(row).unused == {"messages[].mood"}


@pytest.mark.parametrize("key", ["images", "image", "videos", "audios"])
def test_a_conversation_is_refused_when_it_has_pictures_beside_it(key: str) -> None:
    assert encode({**chat("hi", "yo"), key: []}).unused == set()
    with pytest.raises(BadRowError, match=f"has {key}: only text can be trained on"):
        encode({**chat("hi", "yo"), key: ["a.png"]})


# ---------------------------------------------------------------------- reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_whatever_the_row_calls_it(key: str, read: str) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        f"{{% if m.{read} %}}<think>{{{{ m.{read} }}}}</think>{{% endif %}}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: "why"}]}
    found = encode(row, template=template)
    assert learnt(found) == "<think>why</think>b<|end|>" and not found.is_rewritten and not found.unused
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: "why"}]}
    assert learnt(encode(shared, template=template)) == "<think>why</think>b<|end|>"


def test_reasoning_is_refused_when_two_names_hold_two_texts() -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "x", "thinking": "x"}
    assert learnt(encode({"messages": [{"role": "user", "content": "a"}, answer]})) == "<think>x</think>b<|end|>"
    with pytest.raises(BadRowError, match="two texts of reasoning: reasoning_content and thinking differ"):
        encode({"messages": [{"role": "user", "content": "a"}, {**answer, "thinking": "y"}]})


# ---------------------------------------------------------------------- tools

CALL = {"function": {"name": "f", "arguments": {"city": "Köln", "n": 1}}}
WIRE = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln", "n": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def tool_row(calls: Any, tools: Any = TOOLS) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}],
        "tools": tools,
    }


_FLAT = {"name": "f", "arguments": CALL["function"]["arguments"]}


_TWICE = {"function": {"name": "f", "arguments": json.dumps(WIRE["function"]["arguments"])}}


@pytest.mark.parametrize("calls", [[CALL], [WIRE], json.dumps([WIRE]), [json.dumps(WIRE)], [_FLAT], [_TWICE]])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_a_call_is_learnt_once_encoded_however_it_is_stored(calls: Any, tools: Any) -> None:
    found = encode(tool_row(calls, tools), template=TOOL_TEMPLATE)
    assert learnt(found) == 'f{"city": "Köln", "n": 1}<|end|>'
    assert '"name": "f"' in text(found) and "\\" not in text(found)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ('"word"', "encoded twice.* is not valid JSON"),
        ('"[1]"', "must be an object .got list as text"),
        ("{a: 1}", "JSON"),
    ],
)
def test_a_call_is_refused_when_its_arguments_are_text_that_holds_no_object(arguments: str, why: str) -> None:
    with pytest.raises(BadRowError, match=rf"tool_calls\[0\]\.function\.arguments.*{why}"):
        encode(tool_row([{"function": {"name": "f", "arguments": arguments}}]), template=TOOL_TEMPLATE)


@pytest.mark.parametrize("key", ["messages", "tools", "add_generation_prompt"])
def test_a_row_cannot_take_the_place_of_what_its_template_is_given(key: str) -> None:
    with pytest.raises(BadRowError, match=rf"chat_template_kwargs\.{key} is given to the template by us; leave it out"):
        encode({**chat("hi", "yo"), "chat_template_kwargs": {key: []}})


def test_a_setting_of_the_template_is_named_when_it_knows_none_of_that_name() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ mood }}<|end|>{% endfor %}"
    row = {**chat("hi", "yo"), "chat_template_kwargs": {"mood": "glad", "enable_thinking": False}}
    assert encode(row, template=template).unused == {"chat_template_kwargs.enable_thinking"}


def test_a_call_is_read_when_it_is_written_as_before_there_were_tools() -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}},
        {"role": "function", "name": "f", "content": "r"}, {"role": "assistant", "content": "done"},
    ]  # fmt: skip
    assert learnt(encode({"messages": turns}, template=TOOL_TEMPLATE)) == 'f{"n": 1}<|end|>done<|end|>'


def test_a_template_that_takes_text_as_arguments_gets_text() -> None:
    template = TOOL_TEMPLATE.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    assert learnt(encode(tool_row([CALL]), template=template)) == 'f{"city": "Köln", "n": 1}<|end|>'


def test_nulls_of_other_rows_are_left_out_when_rows_come_from_a_table(tmp_path: Path) -> None:
    """Arrow gives every struct all keys that any row has; JSON's own nulls stay."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})]
    rows = [tool_row([call]) for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [r.value for r in rows_of(FileSource((tmp_path / "rows.parquet",)))]
    assert read[0] is not None and read[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(tool_row([{"function": {"name": "f", "arguments": {"a": None}}}])))
    (own,) = [r.value for r in rows_of(FileSource((tmp_path / "rows.jsonl",)))]
    assert own is not None and own["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


# ---------------------------------------------------------------------- files

ROWS = [{"text": "one"}, {"text": "zwei ä"}]


def _json_lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def _csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "note"])
        writer.writeheader()
        writer.writerows([{**row, "note": ""} for row in ROWS])


FILES: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_bytes(_json_lines()),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + _json_lines()),
    "a.ndjson": lambda p: p.write_bytes(_json_lines().replace(b"\n", b"\r\n")),
    "array.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "array.json": lambda p: p.write_bytes(b"\xef\xbb\xbf\n  " + json.dumps(ROWS, indent=4).encode()),
    "lines.json": lambda p: p.write_bytes(_json_lines()),
    "a.csv": _csv,
    "A.JSONL.GZ": lambda p: p.write_bytes(gzip.compress(_json_lines())),
    "array.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode())),
    "a.jsonl.zst": lambda p: p.write_bytes(pa.compress(_json_lines(), codec="zstd", asbytes=True)),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    found = list(rows_of(FileSource((path,))))
    assert [row.value for row in found] == ROWS and all(str(path) in row.where for row in found)


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert [row.value for row in rows_of(FileSource((tmp_path / "one.json",)))] == ROWS[:1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_a_file_that_was_cut_off_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name.removesuffix(".gz")](tmp_path / "whole")
    path.write_bytes(gzip.compress((tmp_path / "whole").read_bytes())[:-12])
    with pytest.raises(DataError, match=name):
        list(rows_of(FileSource((path,))))


def test_odd_rows_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + "[" * 100_000 + '\n{"text": "\\ud800"}\n"text"\n')
    found = list(rows_of(FileSource((path,))))
    assert [row.where for row in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
    assert [row.problem is None for row in found] == [True, False, True, False]
    assert found[2].value is not None
    with pytest.raises(BadRowError, match="lone surrogate"):
        encode(found[2].value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"text": "a"}\n,\n{"text": ]', "invalid JSON from line 3 on"),
        ('[{"text": "a"}', "expecting ',' or ']' after element 1"),
        ('[{"text": "a"} {"text": "b"}]', "expecting ',' or ']' after element 1"),
        ('[{"text": "a"},]', "invalid JSON from line 1 on"),
        ('[{"text": "a"}]\n{"text": "b"}', "'{' follows the array"),
        ("[", "the file ends inside of it"),
        ('[{"text": "\\u00', "invalid JSON from line 1 on"),
    ],
)
def test_an_array_that_ends_badly_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        list(rows_of(FileSource((tmp_path / "rows.json",))))


def test_an_array_is_streamed_when_it_is_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders of pieces fall everywhere: in names, numbers, escapes and characters of several bytes."""
    values: list[Any] = [{"text": "é😀" * n, "n": 10**n, "more": [[], {}, ']},\\"']} for n in range(40)] + [[1], -1.5e3]
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(values, indent=indent, ensure_ascii=indent is None))
        for size in (1, 2, 7, 64):
            monkeypatch.setattr("launcher.data.readers._PIECE_BYTES", size)
            found = [row.value for row in rows_of(FileSource((tmp_path / "rows.json",)))]
            assert found == [*values[:-2], None, None]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_rows_are_read_when_a_file_is_utf_16(tmp_path: Path, name: str, encoding: str) -> None:
    """PowerShell's `>` writes it."""
    text = {"csv": "text\r\né\r\nb\r\n", "json": '[{"text": "é"},\r\n {"text": "b"}]'}
    content = text.get(name.split(".")[1], '{"text": "é"}\r\n{"text": "b"}\r\n')
    mark = "" if encoding == "utf-16" else "\ufeff"
    packed = (mark + content).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(packed) if name.endswith("gz") else packed)
    assert [row.value for row in rows_of(FileSource((tmp_path / name,)))] == [{"text": "é"}, {"text": "b"}]


def test_a_csv_is_refused_when_two_columns_have_one_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="the header has the column 'text' more than once"):
        list(rows_of(FileSource((path,))))


@pytest.mark.parametrize(
    "text",
    [
        "prompt;completion\na;b\n",
        "prompt\tcompletion\na\tb\n",
        "prompt, completion\na,b\n",
        ",prompt,completion\n0,a,b\n",
    ],
)
def test_a_csv_of_another_dialect_gives_the_same_row(tmp_path: Path, tokenizer: Any, text: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    (row,) = rows_of(FileSource((path,)))
    assert row.value is not None
    (found,) = Formatter(tokenizer, 100, None).encode([("x", row.value)])
    (expected,) = Formatter(tokenizer, 100, None).encode([("x", {"prompt": "a", "completion": "b"})])
    assert isinstance(found, Encoded) and isinstance(expected, Encoded)
    assert found.tokens.tolist() == expected.tokens.tolist() and found.unused == frozenset()
