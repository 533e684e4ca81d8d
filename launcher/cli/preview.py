"""`launcher preview`: rows as they are trained on, before anything is trained. The tokenizer is loaded, no model."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.text import printable
from launcher.cli.arguments import find_own_modules, parse_settings
from launcher.cli.train import as_argv
from launcher.config.compose import compose_arguments

if TYPE_CHECKING:
    from launcher.data.preview import PreviewRow, SetSummary

_EPILOG = """examples:
  launcher preview data.train_files=chat.jsonl model.model_name_or_path=Qwen/Qwen2.5-0.5B
  launcher preview data.train_files=chat.jsonl --rows 3 --split train --json

Takes the same overrides as `launcher train`. What is in ⟦ ⟧ (coloured in a terminal) bears loss; the rest does not."""
_BAR = 40
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them: colours, the cursor, the direction of writing."""


def main(argv: Sequence[str]) -> int:
    """Shows rows and what the whole set looks like; returns the exit code.

    Raises:
        ConfigError: the overrides are wrong. DataError: rows cannot be used. UserError: there is no such split.
    """
    parser = argparse.ArgumentParser(
        prog="launcher preview", usage="launcher preview [--rows N] [--split train|eval] [--json] [OVERRIDE…]",
        description="Show rows as they are trained on: text with the parts that bear loss marked, lengths, cuts.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=5, metavar="N", help="how many (default 5)")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="of which rows (default train)")
    parser.add_argument("--json", action="store_true", help="a list of rows, for programs")
    options, arguments = parse_settings(parser, argv)
    if options.rows < 0:
        raise UserError(f"--rows must be at least 0 (got {options.rows})")
    config = compose_arguments(as_argv(arguments))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    find_own_modules()
    from launcher.data import build_tokenizer
    from launcher.data.preview import preview, runs

    tokenizer = build_tokenizer(config)
    rows, summary, data = preview(config, tokenizer, split=options.split, num_rows=options.rows)
    if summary is None:
        raise UserError(f"--split {options.split}: this config has no rows for evaluation. Set data.eval_files=[FILE]")
    if options.json:
        is_utf_8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
        print(json.dumps([row.to_dict() for row in rows], ensure_ascii=not is_utf_8))
        return EXIT_DONE
    for row in rows:
        _show(row, list(runs(tokenizer, row)))
    print(_describe(summary, config.data.packing))
    for notice in data.notices:
        print(notice)
    return EXIT_DONE


def _visible(text: str) -> str:
    """The text with what a terminal would obey written out, as in a string of Python."""
    return _UNSEEN.sub(lambda found: printable(found[0]), text)


def _show(row: PreviewRow, parts: list[tuple[str, bool]]) -> None:
    parts = [(_visible(text), has_loss) for text, has_loss in parts]
    cut = ", cut at data.max_length" if row.is_truncated else ""
    head = f"{row.source}:{row.line}  {row.num_tokens} tokens, {row.num_labelled} with loss{cut}"
    if not sys.stdout.isatty():
        print(head, "".join(f"⟦{text}⟧" if has_loss else text for text, has_loss in parts), "", sep="\n")
        return
    from rich.console import Console
    from rich.text import Text

    console: Any = Console(highlight=False, soft_wrap=True)
    console.print(Text(head, style="bold"))
    console.print(Text.assemble(*((text, "green" if has_loss else "dim") for text, has_loss in parts)))
    console.print()


def _describe(summary: SetSummary, is_packed: bool) -> str:
    """Sizes, shares and a histogram of lengths."""
    what = f"{summary.num_rows:,} rows in {summary.num_samples:,} packs" if is_packed else f"{summary.num_rows:,} rows"
    share = summary.num_labelled / max(1, summary.num_tokens)
    lines = [
        f"{what}, {summary.num_tokens:,} tokens, {share:.1%} of them with loss; "
        f"padding {summary.padding:.1%} of a batch; longest {int(summary.lengths.max()):,}",
        "tokens per " + ("pack" if is_packed else "row"),
    ]
    return "\n".join([*lines, *_histogram(summary.lengths.tolist())])


def _histogram(lengths: list[int]) -> list[str]:
    """A bar for each power of two."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length.bit_length()] = counts.get(length.bit_length(), 0) + 1
    most = max(counts.values())
    lines = []
    for bits in sorted(counts):
        bar = "█" * max(1, round(_BAR * counts[bits] / most))
        lines.append(f"  {1 << (bits - 1):>7,} to {(1 << bits) - 1:<7,} {bar} {counts[bits]:,}")
    return lines
