"""A tokenizer's chat template that also tells where in its text each message stands.

Templates rewrite conversations: Qwen3's drops the reasoning of earlier answers, others move or merge turns. So the
place of a turn cannot be found by rendering the beginning of a conversation. Instead the loops of the template (Jinja's
syntax tree) are given marks: a turn is what the template prints while a loop stands at that message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.data.template_date import CLOCK, clock

_START, _INNER, _END, _GENERATED, _GENERATED_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
"""Code points that Unicode reserves for a program's own use: no text that is exchanged holds them."""
RESERVED = re.compile(f"[{_START}-{_GENERATED_END}]")
"""What no message may hold."""
_ANY_MARK = re.compile(f"{_START}(\\d+){_INNER}|{_END}|{_GENERATED}|{_GENERATED_END}")
_MARK_FUNCTION = "launcher_mark_"
_PROBE = "probe of content"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    `turns[i]` are the characters [start, end) that the template printed at message i, in order; empty where it printed
    nothing there. `generated` are those inside of `{% generation %}`; None where the template has no such tags.
    `inner` are the messages that were printed while a loop stood at another one.
    """

    text: str
    turns: list[list[tuple[int, int]]]
    generated: list[tuple[int, int]] | None
    inner: frozenset[int] = frozenset()


class _Marks:
    """The function that a marked template calls at both ends of every turn of every loop."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self._numbers = {id(message): i for i, message in enumerate(messages)}
        self._open: list[tuple[int, bool]] = []

    def __call__(self, loop: int, is_start: bool, indexed: Sequence[tuple[Any, Any]], *values: Any) -> str:
        if is_start:
            values = (*values, *(items[i] for items, i in indexed if _has(items, i)))
            number = next((self._numbers[id(v)] for v in values if id(v) in self._numbers), None)
            self._open.append((loop, number is not None))
            return "" if number is None else f"{_START}{number}{_INNER}"
        ends = ""
        while self._open:
            at, is_message = self._open.pop()
            ends += _END if is_message else ""
            if at == loop:
                break
        return ends


def _has(items: Any, i: Any) -> bool:
    return isinstance(items, list) and isinstance(i, int) and -len(items) <= i < len(items)


class ChatTemplate:
    """Renders conversations with the tokenizer's template, or with its template for tools where it has one.

    Args:
        tokenizer: a PreTrainedTokenizerBase with a chat template.
        day: what a template that asks for the date is told (YYYY-MM-DD); None: today.
    """

    def __init__(self, tokenizer: Any, day: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._globals: dict[str, Any] = {} if day is None else {CLOCK: clock(day)}
        self._compiled: dict[str, Any] = {}
        self._words: dict[str, frozenset[str]] = {}
        self.takes_text = self._shows(_PROBE) or not self._shows([{"type": "text", "text": _PROBE}])
        """Whether a message's content may be a text; else it must be a list of parts."""

    def words(self, tools: list[Any] | None) -> frozenset[str]:
        """All that is spelled out in the template: a key of a message that is not among it has no effect."""
        source = self._tokenizer.get_chat_template(tools=tools)
        if source not in self._words:
            self._words[source] = frozenset(re.findall(r"\w+", source))
        return self._words[source]

    def _shows(self, content: Any) -> bool:
        try:
            return _PROBE in self.render([{"role": "user", "content": content}]).text
        except Exception:  # whatever a template raises about content that it does not take
            return False

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, kwargs: dict[str, Any] | None = None,
        *, add_generation_prompt: bool = False,
    ) -> Conversation:  # fmt: skip
        """Whatever the template raises is raised."""
        source = self._tokenizer.get_chat_template(tools=tools)
        template, has_tags = self._template(source)
        values = {**self._globals, **self._tokenizer.special_tokens_map, **(kwargs or {})}
        rendered: str = template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **values,
            **{_MARK_FUNCTION: _Marks(messages)},
        )  # fmt: skip
        chat = _read_marks(rendered, len(messages))
        return chat if has_tags else replace(chat, generated=None)

    def _template(self, source: str) -> tuple[Any, bool]:
        if source not in self._compiled:
            self._compiled[source] = _compile(source), _GENERATION_TAG.search(source) is not None
        found: tuple[Any, bool] = self._compiled[source]
        return found


def _compile(source: str) -> Any:
    """The template with marks, in the very environment in which transformers renders it."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer
    from transformers.utils.chat_template_utils import _compile_jinja_template  # seen: transformers 5.23

    environment: Any = _compile_jinja_template(source).environment

    def call(number: int, is_start: bool, names: Sequence[str] = (), indexed: Sequence[str] = ()) -> nodes.Output:
        pairs: list[nodes.Expr] = [nodes.Tuple([load(items), load(names[0])], "load") for items in indexed]
        arguments: list[nodes.Expr] = [nodes.Const(number), nodes.Const(is_start), nodes.Tuple(pairs, "load")]
        arguments += [load(name) for name in names]
        return nodes.Output([nodes.Call(nodes.Name(_MARK_FUNCTION, "load"), arguments, [], None, None)])

    def load(name: str) -> nodes.Name:
        return nodes.Name(name, "load")

    def lists_indexed_by(name: str, body: list[nodes.Node]) -> list[str]:
        """What a loop over numbers takes the messages from: Gemma 4's looks for the answers to a call so."""
        items = (item for node in body for item in [node, *node.find_all(nodes.Getitem)])
        return sorted({
            item.node.name for item in items if isinstance(item, nodes.Getitem)
            and isinstance(item.node, nodes.Name) and isinstance(item.arg, nodes.Name) and item.arg.name == name
        })  # fmt: skip

    class Marking(NodeTransformer):
        number = 0
        loops: list[int]  # around the current node

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.number += 1
            number = self.number
            self.loops.append(number)
            self.generic_visit(node)
            self.loops.pop()
            names = [name.name for name in node.target.find_all(nodes.Name)]
            indexed: list[str] = []
            if isinstance(node.target, nodes.Name):
                names = [node.target.name]
                indexed = lists_indexed_by(node.target.name, node.body)
            node.body = [call(number, True, names, indexed), *node.body, call(number, False)]
            return node

        def visit_Continue(self, node: nodes.Continue) -> list[nodes.Node]:
            return [call(self.loops[-1], False), node]

        visit_Break = visit_Continue

        def visit_CallBlock(self, node: nodes.CallBlock) -> list[nodes.Node]:
            """`{% generation %}`: its own marks, so that the text is rendered once."""
            self.generic_visit(node)
            is_generation = "_generation_support" in repr(node.call)
            if not is_generation:
                return [node]
            start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_GENERATED, _GENERATED_END))
            return [start, *node.body, end]

    marking = Marking()
    marking.loops = []
    tree = marking.visit(environment.parse(source))
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
        if getattr(node, "lineno", None) is None:
            node.lineno = 1
    code = environment.compile(tree, None, None)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _read_marks(rendered: str, num_messages: int) -> Conversation:
    """The text without marks, where each message stands in it, and what was inside of generation tags.

    A message that is printed while the loop stands at another one is not part of that: Gemma 4's answers of tools.
    """
    turns: list[list[tuple[int, int]]] = [[] for _ in range(num_messages)]
    generated: list[tuple[int, int]] = []
    parts: list[str] = []
    opened: list[tuple[int, int]] = []  # message, start
    inner: set[int] = set()
    length = at = generated_start = 0

    def close(number: int, start: int, end: int) -> None:
        if start < end and turns[number] and turns[number][-1][1] == start:
            turns[number][-1] = turns[number][-1][0], end
        elif start < end:
            turns[number].append((start, end))

    for mark in _ANY_MARK.finditer(rendered):
        part = rendered[at : mark.start()]
        parts.append(part)
        length, at = length + len(part), mark.end()
        if mark[1] is not None:
            if opened and opened[-1][0] != int(mark[1]):
                inner.add(int(mark[1]))
            if opened:
                close(*opened[-1], length)
            opened.append((int(mark[1]), length))
        elif mark[0] == _END:
            if opened:
                close(*opened.pop(), length)
            if opened:
                opened[-1] = opened[-1][0], length
        elif mark[0] == _GENERATED:
            generated_start = length
        elif generated_start < length:
            generated.append((generated_start, length))
    parts.append(rendered[at:])
    return Conversation("".join(parts), turns, generated, frozenset(inner))


def kwargs_key(kwargs: dict[str, Any]) -> str:
    """Of what a template was told beside the messages."""
    return json.dumps(kwargs, sort_keys=True, default=str)
