"""A warp's events laid over the machine code: which instructions it went through, in order.

    way = Automaton(lines).match(events, tail)      way.steps: (number of the instruction, its event or None)

The control flow graph is an automaton that reads ordered words, and the warp's events are what it read. Of
the ways through it with this reading, the one is taken whose exponentials, stores and so on between two
events are most like the PTX's; what the assembler moved across an ordered instruction costs the same on every
way. A guarded instruction may have been passed without effect, and so may a look at an mbarrier: its phase
was not over yet, and the event is the look that found it over.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from . import words
from .decode import Line
from .trace import Event

END = "end"
MOST_WAYS = 12  # to one place, unlike each other, that are followed
LONGEST = 20000  # instructions between two events
PASSED = 3.0  # what it costs to have passed an ordered instruction without effect
LENGTH = 0.002  # and to have gone through an instruction
WEIGHTS = {"select": 0.5, "multiply": 0.1, "load shared": 0.5, "store shared": 0.5}
_WEIGHTS = tuple(WEIGHTS.get(name, 1.0) for name in words.SHAPES)


class NoWay(ValueError):
    """The machine code cannot have read these events."""


@dataclass(frozen=True)
class Piece:
    """A way from one ordered instruction, exclusive, to the next that counts, inclusive."""

    numbers: tuple[int, ...]
    passed: int
    shape: tuple[int, ...]

    def unlike(self, shape: list[int]) -> float:
        """What it costs to say that this is where PTX had these SHAPE words."""
        apart = sum(w * abs(a - b) for w, a, b in zip(_WEIGHTS, self.shape, shape, strict=True) if a != b)
        return apart + PASSED * self.passed + LENGTH * len(self.numbers)


@dataclass
class Way:
    """Instructions in order, each with its event, and how unlike the PTX's words between events were."""

    steps: list[tuple[int, Event | None]]
    unlike: float


@dataclass
class Automaton:
    """The control flow graph of a kernel, read by ordered words."""

    lines: list[Line]
    _pieces: dict[tuple[int, str], list[Piece]] = field(default_factory=dict)

    @cached_property
    def words(self) -> list[str | None]:
        """Of each line; its ordered word only."""
        spoken = [words.of_machine(line.opcode) for line in self.lines]
        return [word if word in words.ORDERED else None for word in spoken]

    @cached_property
    def shapes(self) -> list[int | None]:
        """Of each line the place of its SHAPE word in counts."""
        spoken = [words.of_machine(line.opcode) for line in self.lines]
        return [words.place(word) if word in words.SHAPE else None for word in spoken]

    def pieces(self, start: int, word: str) -> list[Piece]:
        """Ways from behind an instruction (-1: from the entry) to the next `word` that has effect."""
        key = (start, word)
        if key not in self._pieces:
            first = (0,) if start < 0 else self.lines[start].after
            best: dict[tuple, Piece] = {}
            for piece in self._search(first, word):
                told = (piece.numbers[-1], piece.shape)
                if told not in best or len(piece.numbers) < len(best[told].numbers):
                    best[told] = piece
            self._pieces[key] = list(best.values())
        return self._pieces[key]

    def _search(self, first: tuple[int, ...], word: str) -> Iterator[Piece]:
        """Of the ways that reach a place with the same words behind them, the first; MOST_WAYS of others."""
        none = (0,) * len(words.SHAPES)
        todo = deque((at, (), none, 0) for at in first)
        seen: dict[int, set[tuple]] = defaultdict(set)
        while todo:
            at, before, shape, passed = todo.popleft()
            if (shape, passed) in seen[at] or len(seen[at]) >= MOST_WAYS:
                continue
            seen[at].add((shape, passed))
            numbers, counts = list(before), list(shape)
            while True:
                line, here = self.lines[at], self.words[at]
                numbers.append(at)
                if (place := self.shapes[at]) is not None:
                    counts[place] += 1
                if here == word or (word == END and line.name == "EXIT"):
                    yield Piece(tuple(numbers), passed, tuple(counts))
                if here is not None and not (line.guard or here == "wait"):
                    break
                passed += here is not None
                if line.after != (at + 1,):
                    if len(numbers) < LONGEST:
                        todo.extend((target, tuple(numbers), tuple(counts), passed) for target in line.after)
                    break
                at += 1

    def match(self, events: list[Event], tail: list[int]) -> Way:
        """The way that reads these events. Raises NoWay where there is none."""
        reached: dict[int, float] = {-1: 0.0}
        history: list[dict[int, tuple[int, Piece]]] = []
        for i, (word, shape) in enumerate([*((e.word, e.shape) for e in events), (END, tail)]):
            arrived: dict[int, float] = {}
            came: dict[int, tuple[int, Piece]] = {}
            for start, cost in reached.items():
                for piece in self.pieces(start, word):
                    total, at = cost + piece.unlike(shape), piece.numbers[-1]
                    if total < arrived.get(at, float("inf")):
                        arrived[at], came[at] = total, (start, piece)
            if not arrived:
                after = ", ".join(event.word for event in events[max(0, i - 4) : i])
                places = [str(self.lines[at]) if at >= 0 else "the entry" for at in reached]
                raise NoWay(f"event {i}, {word}, after {after}: not to be had from {'; '.join(places)}")
            reached = arrived
            history.append(came)
        at = min(reached, key=lambda at: reached[at])
        return Way(self._back(history, at, events), reached[at])

    def _back(
        self, history: list[dict[int, tuple[int, Piece]]], at: int, events: list[Event]
    ) -> list[tuple[int, Event | None]]:
        steps: list[tuple[int, Event | None]] = []
        for came, event in zip(reversed(history), reversed([*events, None]), strict=True):
            at, piece = came[at]
            *between, last = piece.numbers
            steps.append((last, event))
            steps += [(number, None) for number in reversed(between)]
        return steps[::-1]
