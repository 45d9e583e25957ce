"""Which register reads may see a register that nothing has written on some path.

Forward dataflow over the control-flow graph: a bit per register, set where every path has written it. mov
and selp copy undefinedness instead of using it. Only reads that the analysis cannot clear are checked while
running, against a predicate row per register that says which threads have written it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import UndefinedRegister
from ..core.code import CONTROL, Step
from ..ptx.operands import Register
from ..ptx.parse import Instruction
from .translation import Operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads


ENDS = ("ret", "exit", "trap")  # after these a thread goes nowhere


class Definedness:
    """The analysis of one entry.

    needs[i]: registers that operation i must check; tracked: registers that need a written-row.
    """

    def __init__(self, operations: list[Operation]):
        self.operations = operations
        self.numbers: dict[Register, int] = {}
        self.sources = [self._bits(o.reads) for o in operations]
        self.copies = [self._bits(o.copies) for o in operations]
        self.results = [self._bits(o.writes) for o in operations]
        self.starts = _block_starts([o.instruction for o in operations])
        self.everything = (1 << len(self.numbers)) - 1
        self.needs: list[list[Register]] = [[] for _ in operations]
        self.tracked: set[Register] = set()
        self._solve()

    def _bits(self, registers: list[Register]) -> int:
        bits = 0
        for register in registers:
            bits |= 1 << self.numbers.setdefault(register, len(self.numbers))
        return bits

    def _after(self, i: int, defined: int) -> int:
        """Registers defined after operation i, given those before it."""
        results = self.results[i]
        if self.copies[i] & ~defined:
            return defined & ~results
        return defined if self.operations[i].instruction.guard is not None else defined | results

    def _solve(self) -> None:
        starts = self.starts
        end = dict(zip(starts, [*starts[1:], len(self.operations)], strict=True))
        incoming = dict.fromkeys(starts, self.everything)
        incoming[0] = 0
        work = [0]
        seen = set()
        while work:
            start = work.pop()
            defined = incoming[start]
            for i in range(start, end[start]):
                defined = self._after(i, defined)
            for successor in successors(self.operations, end[start]):
                merged = incoming[successor] & defined
                if merged != incoming[successor] or successor not in seen:
                    incoming[successor] = merged
                    seen.add(successor)
                    work.append(successor)
        self._collect(incoming, end)

    def _collect(self, incoming: dict[int, int], end: dict[int, int]) -> None:
        """Find the reads to check, then the registers whose state those reads depend on through copies."""
        suspicious_copies = []
        for start in self.starts:
            defined = incoming[start]
            for i in range(start, end[start]):
                operation = self.operations[i]
                if self.sources[i] & ~defined:
                    self.needs[i] = [r for r in operation.reads if ~defined >> self.numbers[r] & 1]
                    self.tracked.update(self.needs[i])
                if self.copies[i] & ~defined:
                    missing = [r for r in operation.copies if ~defined >> self.numbers[r] & 1]
                    suspicious_copies.append((i, missing))
                defined = self._after(i, defined)
        grown = True
        while grown:
            before = len(self.tracked)
            for i, registers in suspicious_copies:
                if self.tracked.intersection(self.operations[i].writes):
                    self.tracked.update(registers)
            grown = len(self.tracked) > before


def _block_starts(instructions: list[Instruction]) -> list[int]:
    starts = {0}
    for i, instruction in enumerate(instructions):
        if is_branch(instruction):
            starts.update(instruction.targets)
        if is_branch(instruction) or instruction.opcode.split(".")[0] in ENDS:
            starts.add(i + 1)
    starts.discard(len(instructions))
    return sorted(starts)


def successors(operations: list[Operation], end: int) -> list[int]:
    """Where control may go after the block that ends before operation `end`."""
    last = operations[end - 1].instruction
    following = [end] if end < len(operations) else []
    if is_branch(last):
        return [*last.targets, *(following if last.guard is not None else [])]
    if last.opcode.split(".")[0] in ENDS:
        return following if last.guard is not None else []
    return following


def watch_registers(
    operation: Operation, step: Step, flags: dict[Register, int], needs: list[Register]
) -> None:
    """Make a step check `needs` before it runs and keep `flags`, the tracked registers' written-rows.

    A guard is checked by the branch itself, or by check_guard around the guarded step.
    """
    if not is_branch(operation.instruction):
        needs = [r for r in needs if r is not operation.instruction.guard]
    writes = [flags[r] for r in operation.writes if r in flags]
    copied = [flags[r] for r in operation.copies if r in flags]
    if writes:
        step.run = _noting(step.run, copied, writes, step.kind == CONTROL)
        step.multiply = None
    if needs:
        step.run = _checking(step.run, [(r.name, flags[r]) for r in needs], step.kind == CONTROL)
        step.multiply = None


def check_guard(operation: Operation, run: Callable, flags: dict[Register, int], control: bool) -> Callable:
    """`run`, which evaluates the operation's guard, with the check that the guard is defined."""
    guard = operation.instruction.guard
    return _checking(run, [(guard.name, flags[guard])], control) if guard in flags else run


def is_branch(instruction: Instruction) -> bool:
    """Whether the instruction handles its guard itself."""
    return instruction.opcode.split(".")[0] in ("bra", "brx")


def _checking(run: Callable, checks: list[tuple[str, int]], control: bool) -> Callable:
    def check(m: Machine, g: Threads) -> None:
        for name, flag in checks:
            written = m.rows["pred"][flag][g.index]
            if not written.all():
                k = int(np.flatnonzero(~written.reshape(-1))[0])
                raise m.fault(UndefinedRegister, g, k, f"{name} is read before anything is written to it")

    return after_check(check, run, control)


def after_check(check: Callable, run: Callable, control: bool) -> Callable:
    """A step's `run` that `check(m, g)` comes before. control: it takes and returns places in the program."""

    def controlled(m: Machine, g: Threads, here: int) -> list:
        check(m, g)
        return run(m, g, here)

    def plain(m: Machine, g: Threads) -> None:
        check(m, g)
        run(m, g)

    return controlled if control else plain


def _noting(run: Callable, copied: list[int], writes: list[int], control: bool) -> Callable:
    def note(m: Machine, g: Threads) -> None:
        rows = m.rows["pred"]
        defined: np.ndarray | bool = True
        for flag in copied:
            defined = rows[flag][g.index] & defined
        for flag in writes:
            rows[flag][g.index] = defined

    def controlled(m: Machine, g: Threads, here: int) -> list:
        note(m, g)
        return run(m, g, here)

    def plain(m: Machine, g: Threads) -> None:
        run(m, g)
        note(m, g)

    return controlled if control else plain
