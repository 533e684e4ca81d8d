"""The HTML file: one template, one style, one script, and the data as JSON that no browser runs.

Everything that comes from a run's folder is untrusted. Texts are escaped by Jinja, data stands in a block of type
application/json without a `<`, and the page's own policy lets a browser run and show nothing but the one script and
style whose hashes it names, and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2 * 2**20
_ASSETS = Path(__file__).with_name("assets")


def render(page: dict[str, Any], data: dict[str, Any]) -> str:
    """The page as a text.

    Args:
        page: what the template shows.
        data: what the script draws.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style = _read("uplot.css") + _read("report.css")
    script = f"/* uPlot:\n{_read('uplot.LICENSE')}*/\n{_read('uplot.js')}\n{_read('report.js')}"
    return environment.get_template("page.html").render(
        page=page, data=Markup(_json(data)), style=Markup(style), script=Markup(script),
        style_hash=_hash(style), script_hash=_hash(script),
    )  # fmt: skip


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON in which nothing can end the block that it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
