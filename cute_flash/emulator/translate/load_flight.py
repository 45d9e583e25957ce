"""Registers that tcgen05.ld has not brought yet.

By the book (tensor_races.py) nothing may use them before tcgen05.wait::ld. Forward dataflow over the
control-flow graph finds the instructions that touch a register which, on some path, was loaded with no
tcgen05.wait::ld since. Where one runs by the book, that is an error. A plain mov only passes its source's
state on: compilers pair registers before the wait, and ptxas removes the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..base.errors import RegisterInFlight
from ..core.code import CONTROL, Step
from ..ptx.operands import Register
from .analysis import after_check, successors
from .translation import Operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

LOADS, WAIT = ("tcgen05.ld", "tcgen05.ld.red"), "tcgen05.wait::ld"


class LoadFlight:
    """The analysis of one entry. touches[i]: registers of operation i that may be under way."""

    def __init__(self, operations: list[Operation], starts: list[int]):
        self.operations, self.starts = operations, starts
        self.touches: dict[int, str] = {}
        self.numbers: dict[Register, int] = {}
        for operation in operations:
            if operation.name in LOADS:
                self._number(operation.writes)
        if self.numbers:
            self._follow_copies()
            self.writes = [self._bits(o.writes) for o in operations]
            self.copies = [self._bits(o.copies) if o.name == "mov" else 0 for o in operations]
            self.uses = [
                self._bits([*o.writes, *o.reads, *(o.copies if o.name != "mov" else ())]) for o in operations
            ]
            self._solve()

    def _number(self, registers: list[Register]) -> None:
        for register in registers:
            self.numbers.setdefault(register, len(self.numbers))

    def _follow_copies(self) -> None:
        """Number what loaded registers are moved to, too."""
        moves = [operation for operation in self.operations if operation.name == "mov"]
        before = 0
        while before < len(self.numbers):
            before = len(self.numbers)
            for move in moves:
                if not self.numbers.keys().isdisjoint(move.copies):
                    self._number(move.writes)

    def _bits(self, registers: list[Register]) -> int:
        bits = 0
        for register in registers:
            if register in self.numbers:
                bits |= 1 << self.numbers[register]
        return bits

    def _after(self, i: int, flight: int) -> int:
        name = self.operations[i].name
        if name == WAIT:
            return 0
        return flight | self.writes[i] if name in LOADS or flight & self.copies[i] else flight

    def _solve(self) -> None:
        end = dict(zip(self.starts, [*self.starts[1:], len(self.operations)], strict=True))
        incoming, work = {0: 0}, [0]
        while work:
            start = work.pop()
            flight = incoming[start]
            for i in range(start, end[start]):
                flight = self._after(i, flight)
            for following in successors(self.operations, end[start]):
                merged = incoming.get(following, 0) | flight
                if following not in incoming or merged != incoming[following]:
                    incoming[following] = merged
                    work.append(following)
        names = list(self.numbers)
        for start, flight in incoming.items():
            for i in range(start, end[start]):
                if early := flight & self.uses[i]:
                    self.touches[i] = names[early.bit_length() - 1].name
                flight = self._after(i, flight)

    def instrument(self, steps: list[Step]) -> None:
        """Make the steps that touch such a register object, by the book."""
        for i, name in self.touches.items():
            steps[i].run = _objecting(steps[i].run, name, steps[i].kind == CONTROL)
            steps[i].multiply = None


def _objecting(run: Callable, name: str, control: bool) -> Callable:
    def check(m: Machine, g: Threads) -> None:
        if m.options.by_the_book:
            text = f"{name} is touched, which tcgen05.ld may still be bringing: no tcgen05.wait::ld since"
            raise m.warp_fault(RegisterInFlight, g, 0, text)

    return after_check(check, run, control)
