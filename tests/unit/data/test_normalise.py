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


def encode(row: dict[str, Any], *, template: str | None = None, **settings: Any) -> Encoded:
    tokenizer = byte_tokenizer() if template else TOKENIZER
    if template:
        tokenizer.chat_template = template
    (result,) = Formatter(tokenizer, 10_000, None, **settings).encode([("rows.jsonl:1", row)])
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


def test_only_the_last_answer_is_learnt_when_loss_on_says_so() -> None:
    row = chat("q1", "first", "q2", "last")
    assert learnt(encode(row)) == "first<|end|>last<|end|>"
    assert learnt(encode(row, loss_on="last_assistant_turn")) == "last<|end|>"


def test_the_token_that_ends_a_turn_is_known() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert encode(chat("hi", "yo")).end_token == end and encode({"text": "abc"}).end_token == end
    endless = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    assert encode(chat("hi", "yo"), template=endless).end_token is None


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


@pytest.mark.parametrize("calls", [[CALL], [WIRE], json.dumps([WIRE]), [json.dumps(WIRE)], [_FLAT]])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_a_call_is_learnt_once_encoded_however_it_is_stored(calls: Any, tools: Any) -> None:
    found = encode(tool_row(calls, tools), template=TOOL_TEMPLATE)
    assert learnt(found) == 'f{"city": "Köln", "n": 1}<|end|>'
    assert '"name": "f"' in text(found) and "\\" not in text(found)


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
