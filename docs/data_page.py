# ruff: noqa: E501 - text as it will stand on the page
"""Writes docs/data.md: every format of data and what is trained on, by `launcher preview` itself. `make docs`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from launcher.cli import preview

TARGET = Path(__file__).with_name("data.md")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
FORMATS: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("A conversation", "The format of the chat completions API. Loss is taken on the assistant's turns.",
     {"messages": [{"role": "system", "content": "Be brief."}, user("2+2?"), assistant("4"), user("Sure?"), assistant("Yes.")]},
     []),
    ("Only the last answer", "`data.loss_on=last_assistant_turn`.",
     {"messages": [user("2+2?"), assistant("4"), user("Sure?"), assistant("Yes.")]},
     ["data.loss_on=last_assistant_turn"]),
    ("An answer that is not to be learned", "`weight: 0` or `train: false` in a message (also `training` and `loss`, as "
     "axolotl and ms-swift call it), in a completion of several turns and with `data.completion_only_loss=false` too. Only "
     "whole answers can be left out, and only the assistant's words are learnt: a weight elsewhere is named as not used.",
     {"messages": [user("2+2?"), assistant("5", weight=0), user("Sure?"), assistant("No, 4.")]}, []),
    ("Content in parts", "Text parts are put together; other parts are refused, with "
     "file and line, and so are rows with `images`, `videos` or `audios` beside the conversation.",
     {"messages": [user([{"type": "text", "text": "2+2?"}]), assistant([{"type": "text", "text": "4"}])]}, []),
    ("Reasoning", "In `reasoning_content`, `reasoning` or `thinking`, whichever the template reads, as transformers hands it "
     "to one. It is learnt as the template writes it; where it drops the reasoning of earlier turns, that is said.",
     {"messages": [user("2+2?"), assistant("4", reasoning_content="two and two")]}, []),
    ("Tool calls", "`arguments` may be an object or its JSON text; `tools` a list, or JSON text. What a template makes of "
     "calls is its own: the built-in one of models from scratch shows none.",
     {"messages": [user("2+2?"), assistant("", tool_calls=[_CALL]), {"role": "tool", "content": "4"}, assistant("4")]}, []),
    ("Prompt and completion", "Loss is taken on the completion; an EOS is added.",
     {"prompt": "2+2=", "completion": "4"}, []),
    ("Prompt and completion as messages", "Loss is taken on the whole completion, from its first answer to its end.",
     {"prompt": [user("2+2?")], "completion": [assistant("4")]}, []),
    ("Text", "Loss is taken on all of it; an EOS is added.", {"text": "Two and two is four."}, []),
    ("ShareGPT", "`conversations` with `from` and `value`; `system` and `tools` where there are any. `function_call` "
     "and `observation` become a call and its answer.",
     {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, []),
    ("Alpaca", "`instruction`, `input` and `output`; `system` and `history` where there are any.",
     {"instruction": "Add.", "input": "2 2", "output": "4"}, []),
    ("Columns of other names", "`data.columns` gives our name for yours: `data.columns.messages=dialogue`. Where a row has "
     "several formats, the one that is named here counts, else the first of prompt + completion, messages, conversations, "
     "instruction + output, text.",
     {"dialogue": [user("2+2?"), assistant("4")]}, ["data.columns.messages=dialogue"]),
]  # fmt: skip

_HEAD = """# Your data

Written by `make docs`: every example below is what `launcher preview` prints. What is in ⟦ ⟧ bears loss; the rest is
context. `launcher preview` with your own settings shows the same of your rows, with your model's template, before anything is
trained; `--json` gives tokens and labels.

`data.train_files` and `data.eval_files` take JSON Lines (`.jsonl`, `.ndjson`), JSON (an array, however indented), CSV and
Parquet, each also as `.gz` or `.zst`; folders and globs; `~` is your home. `data.dataset_name` takes a data set of the Hub, or
a folder that `datasets` has saved. A row that cannot be used is named with file and line before the training starts;
`data.on_bad_row=skip` skips and counts such rows. In tables (Parquet, data sets) a null is no value: such formats give every
object the keys of all others. What a row holds and nobody uses (columns of other names, keys of messages that the template
does not know, tools that it does not show) is named once, before the first step and by `launcher preview`.

The assistant's words are found in the conversation as the template renders it as a whole, so what is trained on is what the
model will see; templates with `{% generation %}` mark them themselves. The header of a turn is context, the token that ends it
is learned, and `generation_config.json` of every checkpoint lists it, so that the trained model stops there.

Templates that print the date (`strftime_now`: Llama 3.2's, gpt-oss's) print one day for as long as a run lasts: that of its
first start, or `data.chat_template_date=YYYY-MM-DD`. It is said before the first step, and kept in config.yaml and in every
checkpoint.

The examples use the built-in tokenizer of models that are trained from scratch.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for title, text, row, overrides in FORMATS:
            Path("rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
            arguments = ["data.train_files=rows.jsonl", *overrides]
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert preview.main([*arguments, "data.cache_dir=cache"]) == 0
            shown = "\n".join(out.getvalue().split("\n\n")[0].splitlines())
            parts += [
                f"## {title}\n", f"{text}\n", f"```json\n{json.dumps(row, ensure_ascii=False)}\n```\n",
                f"```\n$ launcher preview {' '.join(arguments)}\n{shown}\n```\n",
            ]  # fmt: skip
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    TARGET.write_text(page(), encoding="utf-8")
