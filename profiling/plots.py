"""Pictures of a report, as SVG text: TFLOP/s over sequence length per head dim, peak memory over N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .record import write_whole

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 176, 36, 44
# One colour per line, ours first; distinguishable with the common colour blindnesses (Okabe and Ito 2008).
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


class Line(NamedTuple):
    """A named curve; points are (x, y)."""

    name: str
    points: list[tuple[float, float]]


class Axis(NamedTuple):
    """What an axis shows; logarithmic in base 2 or from zero."""

    title: str
    logarithmic: bool


def draw(data: dict[str, Any], directory: Path) -> list[Path]:
    """Write the pictures that the data allow beside DIRECTORY's name; returns their paths."""
    rows = data["stages"].get("speed", {}).get("rows", [])
    found = []
    for name, lines in speeds(rows).items():
        path = directory.with_name(f"{directory.name}-{name}.svg")
        picture = svg(f"{name}, bfloat16", Axis("tokens", True), Axis("TFLOP/s", False), lines)
        write_whole(path, picture)
        found.append(path)
    if lines := memories(rows):
        path = directory.with_name(f"{directory.name}-memory.svg")
        write_whole(path, svg("memory of a call", Axis("tokens", True), Axis("MiB at the peak", True), lines))
        found.append(path)
    return found


def speeds(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Head dim and mask -> a line per peer."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.get("kind") != "row":
            continue
        lines = found.setdefault(row["key"].rpartition("-s")[0], {})
        for name, peer in row["peers"].items():
            if "tflops" in peer:
                lines.setdefault(name, []).append((row["shape"]["seqlen"], peer["tflops"]))
    return {key: _sorted(lines) for key, lines in found.items() if lines}


def memories(rows: list[dict[str, Any]]) -> list[Line]:
    """A line per peer whose memory was counted."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items() if row.get("kind") == "memory" else ():
            if peer.get("bytes"):
                lines.setdefault(name, []).append((row["seqlen"], peer["bytes"] / 2**20))
    return _sorted(lines)


def svg(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """A chart. Raises ValueError without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    xs, x_ticks = _scale([p[0] for p in points], x.logarithmic, LEFT, WIDTH - RIGHT)
    ys, y_ticks = _scale([p[1] for p in points], y.logarithmic, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, "start", 13),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.title),
        _text(LEFT, TOP - 6, y.title, "end"),
    ]
    for tick in x_ticks:
        parts.append(_text(xs(tick), HEIGHT - BOTTOM + 16, _number(tick)))
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {ys(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, ys(tick) + 4, _number(tick), "end"))
    for i, line in enumerate(lines):
        colour, width = COLOURS[i % len(COLOURS)], 2.5 if i == 0 else 1.5
        places = [(f"{xs(a):.1f}", f"{ys(b):.1f}") for a, b in line.points]
        path = "L".join(" ".join(place) for place in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="2.5" fill="{colour}"/>' for a, b in places]
        at = f'x="{WIDTH - RIGHT + 12}" y="{TOP + 16 * i + 8}"'
        parts.append(f'<text {at} fill="{colour}">{_escaped(line.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _sorted(lines: dict[str, list[tuple[float, float]]]) -> list[Line]:
    return [Line(name, sorted(points)) for name, points in lines.items()]


def _scale(values: list[float], logarithmic: bool, start: float, end: float):
    """(value -> coordinate, ticks)."""
    if logarithmic:
        low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
        high = max(high, low + 1)
        step = max(1, (high - low) // 7)
        ticks = [2.0**n for n in range(low, high + 1, step)]
        return lambda v: start + (math.log2(v) - low) / (high - low) * (end - start), ticks
    size = 10.0 ** math.floor(math.log10(max(values)))
    step = next(size * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if max(values) <= 6 * size * factor)
    top = step * math.ceil(max(values) / step)
    ticks = [step * n for n in range(round(top / step) + 1)]
    return lambda v: start + v / top * (end - start), ticks


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _number(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    return f"{value:.4g}"
