"""The loss curve as a PNG: the Hub shows PNG files but serves SVG as text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 28, 36
_INK, _GRID, _TRAIN, _EVAL = "#464646", "#e4e4e4", "#2563eb", "#d97706"
Points = Sequence[tuple[float, float]]


def draw_curve(train: Points, evaluation: Points) -> bytes:
    """A PNG of (step, loss) points; finite values only, at least one.

    The same points give the same bytes, so that an unchanged curve is not sent again.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    points = [*train, *evaluation]
    low_x, high_x = _range([x for x, _ in points], margin=0.0)
    low_y, high_y = _range([y for _, y in points], margin=0.02)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT),
            _TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM),
        )

    for i in range(5):
        value_x, value_y = low_x + (high_x - low_x) * i / 4, low_y + (high_y - low_y) * i / 4
        x, y = place(value_x, value_y)
        draw.line([(_LEFT, y), (WIDTH - _RIGHT, y)], fill=_GRID)
        draw.line([(x, _TOP), (x, HEIGHT - _BOTTOM)], fill=_GRID)
        draw.text((_LEFT - 8, y), f"{value_y:.4g}", fill=_INK, anchor="rm")
        draw.text((x, HEIGHT - _BOTTOM + 8), f"{value_x:.4g}", fill=_INK, anchor="mt")
    for curve, color in ((train, _TRAIN), (evaluation, _EVAL)):
        places = [place(x, y) for x, y in curve]
        draw.line(places, fill=color, width=2)
        if len(places) < 100 or color == _EVAL:
            for x, y in places:
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=color)
    draw.text((_LEFT, 8), "train loss", fill=_TRAIN)
    if evaluation:
        draw.text((_LEFT + 90, 8), "eval loss", fill=_EVAL)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    extra = (high - low) * margin if high > low else max(abs(low) * 0.1, 0.5)
    return low - extra, high + extra
