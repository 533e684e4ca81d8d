"""Hand-made token masks for every format."""

from __future__ import annotations

import random
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.base.errors import ConfigError
from launcher.data.formats import BadRowError, Encoded, Formatter
from launcher.data.spans import spans_at_once, token_span

from .conftest import PLAIN_TEMPLATE, REWRITING_TEMPLATE, chat

LOSS, NONE = True, False


def encode(tokenizer: Any, row: dict[str, Any], *, only: bool | None = None, max_length: int = 200) -> Encoded:
    (result,) = Formatter(tokenizer, max_length, only).encode([("rows.jsonl:1", row)])
    if isinstance(result, BadRowError):
        raise result
    return result


def pieces(tokenizer: Any, encoded: Encoded) -> list[tuple[bool, str]]:
    """The row cut where its mask changes."""
    pairs = zip(encoded.mask.tolist(), encoded.tokens.tolist(), strict=True)
    groups = [(mask, [token for _, token in group]) for mask, group in groupby(pairs, key=lambda pair: pair[0])]
    return [(mask, tokenizer.decode(tokens)) for mask, tokens in groups]


def as_chat(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def test_a_tokenizer_is_saved_as_it_came_when_its_file_says_how_to_cut_and_pad(tokenizer: Any, tmp_path: Path) -> None:
    """As those of many fine-tuned models do; a run that finds its data in the cache tokenises nothing."""
    tokenizer.backend_tokenizer.enable_truncation(8, stride=1)
    tokenizer.backend_tokenizer.enable_padding(pad_id=256, pad_token="<|pad|>", length=8)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "before")
    assert loaded.backend_tokenizer.truncation is not None and loaded.backend_tokenizer.padding is not None
    encoded = encode(loaded, chat("hi", "yo", "a longer question", "an answer"))
    assert len(encoded.tokens) > 30
    loaded.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


# ---------------------------------------------------------------------- messages


def test_messages_when_template_has_generation_tags(tokenizer: Any) -> None:
    row = chat("hi", "yo", "ok?", "<think>m</think>né")
    assert pieces(tokenizer, encode(tokenizer, row)) == [
        (NONE, "<|user|>hi<|end|><|assistant|>"),
        (LOSS, "yo<|end|>"),
        (NONE, "<|user|>ok?<|end|><|assistant|>"),
        (LOSS, "<think>m</think>né<|end|>"),
    ]


_END_BEFORE_THE_NEXT = (
    "{% for m in messages %}{% if not loop.first %}<|end|>{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|end|>"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_HEADER_IN_ANY_CASE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def test_the_token_that_ends_a_turn_is_learnt_when_the_template_prints_it_before_the_next_turn(tokenizer: Any) -> None:
    """Jamba's; a template that prints the next header in any case does not have it learnt."""
    tokenizer.chat_template = _END_BEFORE_THE_NEXT
    row = chat("hi", "yo", "ok?", "no")
    assert pieces(tokenizer, encode(tokenizer, row)) == [
        (NONE, "<|user|>hi<|end|><|assistant|>"),
        (LOSS, "yo<|end|>"),
        (NONE, "<|user|>ok?<|end|><|assistant|>"),
        (LOSS, "no<|end|>"),
    ]
    ending = {"messages": [*row["messages"][:2], *as_chat("user", "ok?")]}
    assert pieces(tokenizer, encode(tokenizer, ending))[1] == (LOSS, "yo<|end|>")
    tokenizer.chat_template = _HEADER_IN_ANY_CASE
    twice = {"messages": [*row["messages"][:2], *as_chat("assistant", "and"), *as_chat("user", "ok?")]}
    assert pieces(tokenizer, encode(tokenizer, twice)) == [
        (NONE, "<|user|>hi<|end|><|assistant|>"),
        (LOSS, "yo<|end|>"),
        (NONE, "<|assistant|>"),
        (LOSS, "and<|end|>"),
        (NONE, "<|user|>ok?<|end|><|assistant|>"),
    ]


def test_messages_exact_tokens(tokenizer: Any) -> None:
    encoded = encode(tokenizer, chat("a", "é"))
    user, end, assistant = (tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|end|>", "<|assistant|>"))
    assert encoded.tokens.tolist() == [user, ord("a"), end, assistant, 0xC3, 0xA9, end]
    assert encoded.mask.tolist() == [False, False, False, False, True, True, True]


def test_messages_when_reasoning_is_a_field_of_its_own(tokenizer: Any) -> None:
    row = {"messages": [*as_chat("user", "q"), {"role": "assistant", "reasoning_content": "r", "content": "a"}]}
    assert pieces(tokenizer, encode(tokenizer, row))[1] == (LOSS, "<think>r</think>a<|end|>")


def test_messages_when_template_has_no_generation_tags(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert pieces(tokenizer, encode(tokenizer, chat("hi", "yo", "ok?", "no"))) == [
        (NONE, "<|user|>hi<|end|>\n<|assistant|>"),
        (LOSS, "yo<|end|>\n"),
        (NONE, "<|user|>ok?<|end|>\n<|assistant|>"),
        (LOSS, "no<|end|>\n"),
    ]


def test_messages_when_prompt_for_the_answer_is_not_in_the_conversation(tokenizer: Any) -> None:
    """R1's templates open `<think>` in the generation prompt only: loss starts where the texts part."""
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert pieces(tokenizer, encode(tokenizer, chat("hi", "yo")))[1] == (LOSS, "yo<|end|>\n")


def test_turns_when_template_closes_every_rendering_with_eos(tokenizer: Any) -> None:
    """As Phi-3's: what is rendered of the first turns has one EOS that the whole conversation lacks."""
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>{% else %}<|end|>{% endif")
    assert pieces(tokenizer, encode(tokenizer, chat("hi", "yo", "ok?", "no"))) == [
        (NONE, "<|user|>hi<|end|>\n<|assistant|>"),
        (LOSS, "yo<|end|>\n"),
        (NONE, "<|user|>ok?<|end|>\n<|assistant|>"),
        (LOSS, "no<|end|>\n<|end|>"),
    ]
    row = {"prompt": as_chat("user", "hi"), "completion": as_chat("assistant", "yo")}
    assert pieces(tokenizer, encode(tokenizer, row))[1] == (LOSS, "yo<|end|>\n<|end|>")


def test_messages_when_tokenizer_has_no_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    fast = encode(tokenizer, chat("hi", "yo", "ok?", "né"))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = encode(tokenizer, chat("hi", "yo", "ok?", "né"))
    assert slow.tokens.tolist() == fast.tokens.tolist()
    assert slow.mask.tolist() == fast.mask.tolist()


def test_messages_when_loss_is_wanted_everywhere(tokenizer: Any) -> None:
    assert pieces(tokenizer, encode(tokenizer, chat("hi", "yo"), only=False)) == [
        (NONE, "<|user|>"),  # the first token: nothing predicts it
        (LOSS, "hi<|end|><|assistant|>yo<|end|>"),
    ]


def test_messages_when_template_writes_bos(word_tokenizer: Any) -> None:
    """The template's BOS is the only one although the tokenizer adds one to plain text."""
    word_tokenizer.chat_template = "{{ bos_token }}" + "".join(
        "{% for m in messages %} {{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoded = encode(word_tokenizer, chat("sky is", "blue"))
    assert pieces(word_tokenizer, encoded) == [(NONE, "<s> sky is"), (LOSS, "blue </s>")]


def test_messages_when_template_rewrites_earlier_turns(tokenizer: Any) -> None:
    """What is trained on is what the template makes of the whole conversation."""
    tokenizer.chat_template = REWRITING_TEMPLATE
    encoded = encode(tokenizer, chat("hi", "<think>m</think>yo", "ok?", "<think>n</think>né"))
    assert pieces(tokenizer, encoded) == [
        (NONE, "<|user|>hi<|end|><|assistant|>"),
        (LOSS, "yo<|end|>"),
        (NONE, "<|user|>ok?<|end|><|assistant|>"),
        (LOSS, "<think>n</think>né<|end|>"),
    ]
    assert encoded.is_rewritten


def test_messages_when_rewriting_template_has_generation_tags(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE.replace(
        "{% if m.role == 'assistant' and", "{% generation %}{% if m.role == 'assistant' and"
    ).replace("<|end|>{% endfor", "<|end|>{% endgeneration %}{% endfor")
    encoded = encode(tokenizer, chat("hi", "<think>m</think>yo", "ok?", "no"))
    assert encoded.is_rewritten
    assert "m" not in tokenizer.decode(encoded.tokens)


def test_messages_when_template_drops_the_reasoning_everywhere(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]")
    assert encode(tokenizer, chat("hi", "<think>m</think>yo")).is_rewritten


def _with_calls(calls: str) -> str:
    return PLAIN_TEMPLATE.replace("m.content", f"(m.content + {calls} if m.tool_calls else m.content)")


@pytest.mark.parametrize(
    ("template", "is_rewritten"),
    [
        ("{{ tools | tojson }}" + PLAIN_TEMPLATE, True),  # offers the tool, drops the call
        (PLAIN_TEMPLATE, True),
        ("{{ tools | tojson }}" + _with_calls("m.tool_calls | tojson"), False),
        (_with_calls("m.tool_calls[0].function.name"), True),  # without its arguments
    ],
)  # fmt: skip
def test_messages_when_template_drops_what_stands_elsewhere_too(
    tokenizer: Any, template: str, is_rewritten: bool
) -> None:
    tokenizer.chat_template = template
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    row = {"messages": [*as_chat("user", "Oslo?"), {"role": "assistant", "content": "", "tool_calls": [call]}],
           "tools": [tool]}  # fmt: skip
    assert encode(tokenizer, row, max_length=2000).is_rewritten == is_rewritten


def test_messages_when_tokenizer_has_no_template(word_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template"):
        encode(word_tokenizer, chat("sky is", "blue"))


# ---------------------------------------------------------------------- prompt + completion


def test_completion_when_text(tokenizer: Any) -> None:
    row = {"prompt": "1+1=", "completion": "2"}
    assert pieces(tokenizer, encode(tokenizer, row)) == [(NONE, "1+1="), (LOSS, "2<|end|>")]
    assert pieces(tokenizer, encode(tokenizer, row, only=False)) == [(NONE, "1"), (LOSS, "+1=2<|end|>")]


def test_completion_when_it_has_its_eos(tokenizer: Any) -> None:
    row = {"prompt": "1+1=", "completion": "2<|end|>"}
    assert pieces(tokenizer, encode(tokenizer, row)) == [(NONE, "1+1="), (LOSS, "2<|end|>")]


def test_completion_when_messages(tokenizer: Any) -> None:
    row = {"prompt": as_chat("user", "hi"), "completion": as_chat("assistant", "yo")}
    expected = [(NONE, "<|user|>hi<|end|><|assistant|>"), (LOSS, "yo<|end|>")]
    assert pieces(tokenizer, encode(tokenizer, row)) == expected
    tokenizer.chat_template = PLAIN_TEMPLATE
    expected = [(NONE, "<|user|>hi<|end|>\n<|assistant|>"), (LOSS, "yo<|end|>\n")]
    assert pieces(tokenizer, encode(tokenizer, row)) == expected


def test_completion_when_template_rewrites_the_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE
    prompt = [*chat("hi", "<think>m</think>yo")["messages"], *as_chat("user", "ok?")]
    encoded = encode(tokenizer, {"prompt": prompt, "completion": as_chat("assistant", "<think>n</think>a")})
    assert pieces(tokenizer, encoded) == [
        (NONE, "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>ok?<|end|><|assistant|>"),
        (LOSS, "<think>n</think>a<|end|>"),
    ]


def test_completion_when_tokenizer_adds_bos(word_tokenizer: Any) -> None:
    encoded = encode(word_tokenizer, {"prompt": "sky is ", "completion": "blue "})
    assert encoded.tokens.tolist() == [0, 7, 6, 5, 1]
    assert encoded.mask.tolist() == [False, False, False, True, True]


def test_completion_when_a_token_crosses_the_border(tokenizer: Any) -> None:
    """As TRL: the token that holds the end of the prompt and the start of the completion bears loss."""
    row = {"prompt": "x<thi", "completion": "nk>y"}
    encoded = encode(tokenizer, row)
    assert encoded.tokens.tolist() == tokenizer("x<think>y<|end|>")["input_ids"]
    assert encoded.mask.tolist() == [False, True, True, True]


# ---------------------------------------------------------------------- text


def test_text_gets_one_eos(tokenizer: Any) -> None:
    expected = [(NONE, "a"), (LOSS, "bc<|end|>")]
    assert pieces(tokenizer, encode(tokenizer, {"text": "abc"})) == expected
    assert pieces(tokenizer, encode(tokenizer, {"text": "abc<|end|>"})) == expected


def test_text_gets_one_bos(word_tokenizer: Any) -> None:
    for text in ("sky is blue ", "<s> sky is blue "):
        encoded = encode(word_tokenizer, {"text": text})
        assert encoded.tokens.tolist() == [0, 7, 6, 5, 1]
        assert encoded.mask.tolist() == [False, True, True, True, True]


def test_text_when_completion_only_loss_is_asked_for(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.completion_only_loss=true.*rows\.jsonl:1 holds text"):
        encode(tokenizer, {"text": "abc"}, only=True)


# ---------------------------------------------------------------------- length and other columns


def test_long_row_is_cut_at_the_end(tokenizer: Any) -> None:
    encoded = encode(tokenizer, {"prompt": "1234", "completion": "56789"}, max_length=6)
    assert encoded.is_truncated
    assert pieces(tokenizer, encoded) == [(NONE, "1234"), (LOSS, "56")]
    assert not encode(tokenizer, {"prompt": "1234", "completion": "5"}, max_length=6).is_truncated


def test_other_columns_do_not_matter(tokenizer: Any) -> None:
    """OpenR1-Math rows hold the problem, the solution and much more beside their messages."""
    openr1 = {"problem": "?", "solution": "!", "prompt": "only half of a pair", "generations": ["a"], "text": None}
    assert pieces(tokenizer, encode(tokenizer, chat("hi", "yo") | openr1))[1] == (LOSS, "yo<|end|>")


def test_batch_keeps_the_order_of_its_rows(tokenizer: Any) -> None:
    rows = [chat("a", "b"), {"text": "c"}, {"text": ""}, {"prompt": "d", "completion": "e"}, {"text": "f"}]
    results = Formatter(tokenizer, 100, None).encode([("x", row) for row in rows])
    ends = [r if isinstance(r, BadRowError) else tokenizer.decode(r.tokens[-2:]) for r in results]
    assert ends[:2] + ends[3:] == ["b<|end|>", "c<|end|>", "e<|end|>", "f<|end|>"]
    assert isinstance(ends[2], BadRowError)


# ---------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no messages, no prompt"),
        ({"question": "?"}, "it has question"),
        ({"text": 5}, "text must be text .*int"),
        ({"text": " \n"}, "text is empty"),
        ({"prompt": "a"}, "it has prompt"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": as_chat("assistant", "b")}, "prompt must be text or a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, r"messages\[0\] must be a message"),
        ({"messages": as_chat("robot", "hi")}, r"messages\[0\].role must be one of .*'robot'"),
        ({"messages": [{"role": "user"}]}, "content must be text"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text .*int"),
        (chat("hi", ""), r"messages\[1\].content is empty"),
        (chat("hi"), "no assistant turn"),
    ],
)
def test_bad_row_says_why(tokenizer: Any, row: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRowError, match=why):
        encode(tokenizer, row)


def test_bad_row_when_template_refuses_it(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRowError, match="chat template refused it: roles must alternate"):
        encode(tokenizer, chat("hi", "yo"))


@pytest.mark.parametrize("kind", ["byte", "word"])
def test_spans_are_the_same_when_found_all_at_once(tokenizer: Any, word_tokenizer: Any, kind: str) -> None:
    """Tokens of part of a character, characters without a token, spans of nothing, spans at both ends."""
    chosen = tokenizer if kind == "byte" else word_tokenizer
    draw = random.Random(1)
    for text in ("red é😀  green\n\n  blue ", "", "   ", " sky is   ", "😀" * 5, "red" * 40):
        batch = chosen([text], add_special_tokens=True)
        find = spans_at_once(batch, 0, len(text))
        spans = [(a, b) for a in range(len(text)) for b in range(a + 1, len(text) + 1)]
        for start, end in draw.sample(spans, min(len(spans), 200)):
            assert find(start, end) == token_span(batch, 0, start, end, len(text)), (text, start, end)


def test_time_grows_with_the_row_when_there_are_many_turns(tokenizer: Any) -> None:
    """Four times the turns: four times the work, not sixteen times."""
    tokenizer.chat_template = PLAIN_TEMPLATE
    formatter = Formatter(tokenizer, 10**9, None)

    def seconds(num_turns: int) -> float:
        row = chat(*("q" if i % 2 == 0 else f"answer {i} " * 3 for i in range(num_turns)))
        began = time.process_time()
        (encoded,) = formatter.encode([("x", row)])
        assert isinstance(encoded, Encoded) and encoded.mask.sum() > 10 * num_turns
        return time.process_time() - began

    seconds(10)
    short, long = (min(seconds(num) for _ in range(2)) for num in (500, 2000))
    assert long < 8 * short


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}", ["YO<|end|>"]),
        ("{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}", ["o<|end|>"]),
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %} bye", ["yo<|end|> bye"]),
    ],
)
def test_only_the_answer_is_learnt_when_a_template_changes_words_or_their_order(
    tokenizer: Any, template: str, expected: list[str]
) -> None:
    """The first token of a row bears no loss: nothing predicts it."""
    tokenizer.chat_template = template
    (found,) = Formatter(tokenizer, 100, None).encode([("x", chat("hi", "yo"))])
    assert isinstance(found, Encoded)
    assert [tokenizer.decode(found.tokens[found.mask])] == expected
