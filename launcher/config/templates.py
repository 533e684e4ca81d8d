"""`data.chat_template`: a file or a text, read and checked without transformers."""

from __future__ import annotations

import functools
from pathlib import Path

from launcher.base.errors import ConfigError


def read_template(text: str) -> str:
    """The template that `data.chat_template` means.

    Raises:
        ConfigError: it is neither a file nor a template, or cannot be read.
    """
    path = Path(text).expanduser() if "\n" not in text and len(text) < 1024 else None
    if path is not None and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"data.chat_template={text} cannot be read: {error}. It must be UTF-8 text"]) from error
    if "{" in text:
        return text
    raise ConfigError([f"data.chat_template={text} is neither a file nor a Jinja template (looked in {Path.cwd()})"])


def template_problem(text: str) -> str | None:
    """Why `data.chat_template` cannot be used: its syntax, as transformers' Jinja reads it."""
    try:
        problem = _syntax_problem(read_template(text))
    except ConfigError as error:
        return error.problems[0]
    if problem is None:
        return None
    shown = text if len(text) < 60 and "\n" not in text else f"{text[:50]!r}…"
    return (
        f"data.chat_template={shown} is no Jinja template: {problem}. For the tokenizer's own: data.chat_template=null"
    )


@functools.lru_cache(maxsize=16)
def _syntax_problem(source: str) -> str | None:
    """Remembered: a sweep checks the settings of many jobs."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}` of transformers."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]).compile(source)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {str(error.message).rstrip('.')}"
    return None
