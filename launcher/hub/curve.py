"""The loss curve as a PNG, drawn without a plotting library: the Hub shows PNG files but serves SVG as text."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 36
_INK, _GRID, _TRAIN, _EVAL = (70, 70, 70), (228, 228, 228), (37, 99, 235), (217, 119, 6)
# 3 by 5 pixels: a number per row, its bits are the pixels
_FONT = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2),
    "-": (0, 0, 7, 0, 0),
    "a": (0, 7, 1, 7, 7),
    "e": (7, 5, 7, 4, 7),
    "i": (2, 0, 2, 2, 2),
    "k": (4, 5, 6, 5, 5),
    "l": (4, 4, 4, 4, 6),
    "n": (0, 6, 5, 5, 5),
    "o": (0, 7, 5, 5, 7),
    "p": (7, 5, 7, 4, 4),
    "r": (0, 7, 4, 4, 4),
    "s": (7, 4, 7, 1, 7),
    "t": (2, 7, 2, 2, 3),
    "v": (0, 5, 5, 5, 2),
    "M": (5, 7, 7, 5, 5),
    " ": (0, 0, 0, 0, 0),
}
Points = Sequence[tuple[float, float]]


def draw_curve(train: Points, evaluation: Points) -> bytes:
    """A PNG of (step, loss) points; finite values only, at least one.

    The same points give the same bytes, so that an unchanged curve is not sent again.
    """
    image = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    points = [*train, *evaluation]
    low_x, high_x = _range([p[0] for p in points], margin=0.0)
    low_y, high_y = _range([p[1] for p in points], margin=0.02)

    def place(point: tuple[float, float]) -> tuple[int, int]:
        x = _LEFT + (point[0] - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high_y - point[1]) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM)
        return round(x), round(y)

    for i in range(5):
        value_x, value_y = low_x + (high_x - low_x) * i / 4, low_y + (high_y - low_y) * i / 4
        x, y = place((value_x, value_y))
        image[y, _LEFT : WIDTH - _RIGHT] = _GRID
        image[_TOP : HEIGHT - _BOTTOM, x] = _GRID
        _text(image, _number(value_y), _LEFT - 8, y - 5, _INK, align_right=True)
        _text(image, _number(value_x), x + 12, HEIGHT - _BOTTOM + 8, _INK, align_right=True)
    for points_of, color in ((train, _TRAIN), (evaluation, _EVAL)):
        places = [place(p) for p in points_of]
        for start, end in pairwise(places):
            _line(image, start, end, color)
        if len(places) < 100 or color == _EVAL:
            for x, y in places:
                image[y - 2 : y + 3, x - 2 : x + 3] = color
    _text(image, "train loss", _LEFT, 8, _TRAIN)
    if evaluation:
        _text(image, "eval loss", _LEFT + 110, 8, _EVAL)
    return _png(image)


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    extra = (high - low) * margin if high > low else max(abs(low) * 0.1, 0.5)
    return low - extra, high + extra


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        return f"{value:.0e}"
    return f"{value:.4g}" if size < 100 else f"{value:.0f}"


def _line(image: np.ndarray, start: tuple[int, int], end: tuple[int, int], color: tuple[int, int, int]) -> None:
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    xs = np.linspace(start[0], end[0], count + 1).round().astype(int)
    ys = np.linspace(start[1], end[1], count + 1).round().astype(int)
    image[ys, xs] = color
    image[ys + 1, xs] = color


def _text(
    image: np.ndarray, text: str, x: int, y: int, color: tuple[int, int, int], *, align_right: bool = False
) -> None:
    scale, advance = 2, 8
    x = max(0, x - advance * len(text)) if align_right else x
    for index, char in enumerate(text):
        for row, bits in enumerate(_FONT.get(char, _FONT["-"])):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    top, left = y + row * scale, x + index * advance + column * scale
                    image[top : top + scale, left : left + scale] = color


def _png(image: np.ndarray) -> bytes:
    """Source: PNG specification, section 5: signature, IHDR, IDAT (zlib, filter 0 per row), IEND."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")
