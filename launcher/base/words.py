"""Numbers as people write them. Standard library only."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """33221 → 33.2k; 1234567 → 1.23M."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value != int(value) else f"{value:.0f}"


def duration(seconds: float) -> str:
    """3 s, 2 min 05 s, 1 h 02 min, 3 d 04 h; 0.12 s below a second."""
    if seconds < 0.995:
        return f"{seconds:.2g} s" if seconds >= 0.0005 else "0 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def size(num_bytes: float) -> str:
    """1536 → 1.5 KB (powers of 1000, as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def percent(share: float) -> str:
    """0.9876 → 98.8 %; never 100 % for what is not all."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "99.9 %"
    return f"{share * 100:.1f} %" if share < 1 else "100 %"


def metric(value: float) -> str:
    """Four digits that say something: 0.9727, 12.35, 1.235e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 4)}f}"
    return f"{value:.3e}".replace("e-0", "e-").replace("e+0", "e")
