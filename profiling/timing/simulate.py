"""From a kernel to clocks: record what its warps do, lay that over its machine code, run the machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

from .costs import costs
from .machine import Machine
from .match import Automaton, Way
from .parts import Step
from .subjects import Subject
from .trace import Event, Join, Recorder


@dataclass
class Run:
    """A machine that has run. clocks: from first to last instruction. unlike: of each warp, see Way."""

    machine: Machine
    clocks: float
    unlike: dict[tuple[int, int], float]


def run(
    subject: Subject,
    chip: SimpleNamespace,
    tiles: int,
    works: int = 1,
    keep: bool = False,
    ctas: int | None = None,
) -> Run:
    """One SM (of a cluster each CTA's) with as many CTAs as it holds. ctas: how many, if not that."""
    recorder = subject.record(tiles, works)
    automaton = Automaton(subject.lines)
    ways = {
        warp: automaton.match(events, recorder.tail[warp])
        for warp, events in sorted(recorder.warps.items())
        if warp[0] < subject.cluster
    }
    made = programs(subject, ways, chip)
    joined, sms = dict(recorder.joined), {cta: cta for cta, _ in made}
    many = subject.ctas if ctas is None else ctas
    for copy in range(1, many):
        more, phases = _again(made, recorder, copy * subject.cluster)
        sms |= {cta: cta % subject.cluster for cta, _ in more}
        made, joined = made | more, joined | phases
    machine = Machine(chip, made, joined, sms, keep)
    return Run(machine, machine.run(), {warp: way.unlike for warp, way in ways.items()})


def programs(
    subject: Subject, ways: dict[tuple[int, int], Way], chip: SimpleNamespace
) -> dict[tuple[int, int], list[Step]]:
    """What the machine runs: of every warp its instructions with their costs."""
    cost = costs(subject.lines, chip)
    made = {}
    for warp, way in ways.items():
        numbers = [number for number, _ in way.steps]
        follows = [*numbers[1:], numbers[-1] + 1]
        made[warp] = [
            (cost[number], event, after != number + 1)
            for (number, event), after in zip(way.steps, follows, strict=True)
        ]
    return made


def _again(
    made: dict[tuple[int, int], list[Step]], recorder: Recorder, shift: int
) -> tuple[dict[tuple[int, int], list[Step]], dict[Join, int]]:
    """The same CTAs under numbers that are `shift` higher: further ones on the same SMs."""

    def moved(phase: Join) -> Join:
        kind, cta, *rest = phase
        return (kind, cta + shift, *rest)

    def event_of(event: Event | None) -> Event | None:
        if event is None or not (event.joins or event.until):
            return event
        joins, until = [moved(phase) for phase in event.joins], event.until and moved(event.until)
        return replace(event, joins=joins, until=until)

    first = min(cta for cta, _ in made)
    more = {
        (cta + shift, warp): [(cost, event_of(event), jumps) for cost, event, jumps in steps]
        for (cta, warp), steps in made.items()
        if cta - first < shift
    }
    return more, {moved(phase): count for phase, count in recorder.joined.items()}
