"""`python -m profiling timeline CASE`: what every warp and unit of an SM does, as a trace and as a picture.

    python -m profiling timeline d128                          our kernel on an H200, 8 KV tiles
    python -m profiling timeline d128_causal --gpu GB200 --tiles 6 --peer --out DIR

DIR/NAME.json is for chrome://tracing or ui.perfetto.dev, a clock in place of a microsecond: a lane for each
warp, for the tensor core, for bulk copies, for each scheduler's MUFU; a wait is an arrow from what ended it.
NAME.svg shows some clocks of it, of four warps that do the same only the first. A warpgroup and what the
tensor core does for it have one colour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from ..static import CASES
from . import constants, simulate, subjects
from .machine import Machine
from .parts import Span
from .table import role

TILES = 8
COLOURS = {"TMA": "#72b7b2", "MUFU": "#f58518", "wait": "#ececec"}
GROUPS = ("#4c78a8", "#54a24b", "#b279a2", "#9d755d")  # of warpgroups, in turn
WIDTH, LANE, LABEL, TOP = 1100, 16, 150, 24
SHOWN = (0.35, 0.75)  # the part of the clocks that a picture has
SMALLEST = 0.6  # pixels of a span that is drawn


def spans_of(machine: Machine) -> list[Span]:
    """All that lanes did, warps' own work between their waits included; by lane and time."""
    waits: dict[str, list[Span]] = {}
    for span in machine.spans:
        if span.name.startswith("wait"):
            waits.setdefault(span.lane, []).append(span)
    found = [span for span in machine.spans if span.end > span.start]
    for warp in machine.warps:
        at = 0.0
        for wait in sorted(waits.get(warp.name, []), key=lambda span: span.start):
            if wait.start > at:
                found.append(Span(warp.name, "runs", at, wait.start))
            at = max(at, wait.end)
        if warp.ended > at:
            found.append(Span(warp.name, "runs", at, warp.ended))
    return sorted(found, key=lambda span: (span.lane, span.start))


def titles(machine: Machine) -> dict[str, str]:
    """Lanes from top to bottom, with what is written beside them."""
    units = [f"SM {number} {unit}" for number in machine.sms for unit in ("TMA", "tensor core")]
    mufu = [f"SM {number} MUFU {i}" for number in machine.sms for i in range(4)]
    warps = {warp.name: f"{warp.name}, {role(warp)}" for warp in machine.warps}
    return {name: name for name in (*units, *mufu)} | warps


def trace(machine: Machine) -> dict[str, Any]:
    """In Chrome's format: complete events, and a flow from what ended a wait to the wait's end."""
    lanes = titles(machine)
    numbers = {lane: i for i, lane in enumerate(lanes)}
    named = [_event("M", i, "thread_name", args={"name": lanes[lane]}) for lane, i in numbers.items()]
    events = [
        _event("X", numbers[span.lane], span.name, ts=span.start, dur=span.end - span.start)
        for span in spans_of(machine)
    ]
    for flow, span in enumerate(span for span in machine.spans if span.cause is not None):
        source = _lane_of(span.cause[0], span.lane, machine)
        if source in numbers:
            both = {"id": flow, "cat": "wait"}
            events.append(_event("s", numbers[source], span.name, ts=span.cause[1], **both))
            events.append(_event("f", numbers[span.lane], span.name, ts=span.end, bp="e", **both))
    return {"traceEvents": named + events, "displayTimeUnit": "ns"}


def _event(kind: str, lane: int, name: str, **more: Any) -> dict[str, Any]:
    return {"ph": kind, "pid": 0, "tid": lane, "name": name, **more}


def _lane_of(who: str, waiter: str, machine: Machine) -> str:
    """The lane of a warp, or of a unit on the waiter's SM."""
    sm = next(warp.scheduler.sm.number for warp in machine.warps if warp.name == waiter)
    return who if who.startswith("CTA") else f"SM {sm} {who}"


def picture(machine: Machine, title: str) -> str:
    """An SVG of some clocks."""
    clocks = max(warp.ended for warp in machine.warps)
    begin, end = (part * clocks for part in SHOWN)
    lanes = {lane: name for lane, name in titles(machine).items() if _is_shown(lane, machine)}
    places = {lane: TOP + i * LANE for i, lane in enumerate(lanes)}
    height = TOP + len(lanes) * LANE + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        f' font-size="10"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="4" y="14" font-size="12">{escape(title)}</text>'
    ]
    scale = (WIDTH - LABEL) / (end - begin)

    def x(clock: float) -> float:
        return LABEL + (min(max(clock, begin), end) - begin) * scale

    parts += [f'<text x="4" y="{y + 11}">{escape(lanes[lane])}</text>' for lane, y in places.items()]
    groups = {warp.name: warp.group for warp in machine.warps}
    for span in spans_of(machine):
        if span.lane in places and x(span.end) - x(span.start) > SMALLEST:
            colour = _colour(span, groups.get(span.lane, span.name.partition(" ")[0]))
            parts.append(_box(x(span.start), x(span.end), places[span.lane], span, colour))
    parts += _arrows(machine, places, x, (begin, end))
    parts += _ruler(begin, end, height, x)
    return "\n".join([*parts, "</svg>\n"])


def _is_shown(lane: str, machine: Machine) -> bool:
    """One warp of four; every unit, the MUFU of one scheduler; warps that end early are left out."""
    warp = next((warp for warp in machine.warps if warp.name == lane), None)
    if warp is None:
        return "MUFU" not in lane or lane.endswith("0")
    alike = [other for other in machine.warps if other.group == warp.group and role(other) == role(warp)]
    return warp is alike[0] and warp.ended > max(other.ended for other in machine.warps) / 3


def _colour(span: Span, group: str) -> str:
    """By unit, or by warpgroup, "CTA:number"."""
    kind = next((kind for kind in COLOURS if kind in span.lane or span.name.startswith(kind)), "")
    number = group.partition(":")[2]
    return COLOURS[kind] if kind else GROUPS[int(number) % len(GROUPS) if number else 0]


def _box(left: float, right: float, y: int, span: Span, colour: str) -> str:
    told = f"{span.name}, clocks {span.start:.0f} to {span.end:.0f}"
    shape = f'x="{left:.1f}" y="{y + 2}" width="{right - left:.1f}" height="{LANE - 4}"'
    return f'<rect {shape} fill="{colour}"><title>{escape(told)}</title></rect>'


def _arrows(machine: Machine, places: dict[str, int], x, shown: tuple[float, float]) -> Iterator[str]:
    for span in machine.spans:
        if span.cause is None or span.lane not in places or not shown[0] < span.end < shown[1]:
            continue
        source = _lane_of(span.cause[0], span.lane, machine)
        if source in places and source != span.lane:
            ends = f'x1="{x(span.end):.1f}" y1="{places[source] + LANE // 2}" x2="{x(span.end):.1f}"'
            yield f'<line {ends} y2="{places[span.lane] + LANE // 2}" stroke="#d62728" stroke-width="0.5"/>'


def _ruler(begin: float, end: float, height: int, x) -> Iterator[str]:
    step = 1000 if end - begin < 12000 else 5000
    for clock in range(int(-(-begin // step) * step), int(end), step):
        yield f'<text x="{x(clock):.0f}" y="{height - 6}">{clock}</text>'
        yield f'<line x1="{x(clock):.0f}" y1="{TOP}" x2="{x(clock):.0f}" y2="{height - 16}" stroke="#bbb"/>'


def main(arguments: list[str]) -> int:
    """Write both files."""
    asked = _arguments(arguments)
    chip, case = constants.of(asked.gpu), CASES[asked.case]
    wanted = subjects.Wanted(case.dims, case.rules == "causal")
    subject = (subjects.peer if asked.peer else subjects.ours)(wanted, chip.family)
    run = simulate.run(subject, chip, asked.tiles, keep=True, ctas=1)
    asked.out.mkdir(parents=True, exist_ok=True)
    stem = asked.out / f"timeline-{chip.family}-{asked.case}{'-peer' * asked.peer}"
    title = f"{subject.name}, {asked.case}, by the timing model of an SM of a {asked.gpu}: clocks"
    for path, text in (
        (stem.with_suffix(".json"), json.dumps(trace(run.machine))),
        (stem.with_suffix(".svg"), picture(run.machine, title)),
    ):
        path.write_text(text)
        print(path)
    return 0


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m profiling timeline", description="A trace and a picture.")
    parser.add_argument("case", choices=list(_cases()), metavar="CASE", help="d128, d64_causal, …")
    parser.add_argument("--gpu", choices=constants.FAMILIES, default="H200")
    parser.add_argument("--tiles", type=int, default=TILES, help="KV tiles")
    parser.add_argument("--peer", action="store_true", help="flash-attn-4's kernel in place of ours")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    return parser.parse_args(arguments)


def _cases() -> Iterable[str]:
    return (name for name, case in CASES.items() if not case.backward and case.rules in ("plain", "causal"))
