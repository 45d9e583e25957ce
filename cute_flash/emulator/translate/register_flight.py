"""Registers that asynchronous products (wgmma) own: who may touch them, and when.

Two rules of the PTX ISA. A product's accumulator and its A registers belong to it from its issue until its
warp has waited for its group; only products on the same accumulator may come between. And a register that an
instruction reads or writes may be used by a product only after a wgmma.fence.

Forward dataflow over the control-flow graph finds the instructions where a rule may be broken on some path:
which products may be under way (not committed, and a stack of committed groups, youngest first), and which
registers may have been used since the last fence. A plain mov only passes its source's state on: compilers
place copies between a fence and a product, and ptxas removes them. Only what the analysis cannot clear is
checked while running.

Permissive, a mov of a constant soils an accumulator only for a product that is added to it: to others the
value is dead, and ptxas removes the mov.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import RegisterInFlight
from ..core.code import CONTROL, Layout, Step
from ..ptx.operands import Register
from ..units.warpgroup import Products
from .analysis import successors
from .translation import Operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads
    from ..units.products import Form

DEPTH = 8  # groups that the analysis tells apart; older ones count as one


class State(NamedTuple):
    """dirty: bits of registers used since a fence. open, groups (youngest first): of products.

    preset: permissive, bits of registers that have been set to a constant since a fence, and not used else.
    """

    dirty: int
    open: int = 0
    groups: tuple[int, ...] = ()
    preset: int = 0

    def merged(self, other: State) -> State:
        longer, shorter = sorted((self.groups, other.groups), key=len, reverse=True)
        shorter = shorter + (0,) * (len(longer) - len(shorter))
        groups = tuple(one | two for one, two in zip(longer, shorter, strict=True))
        return State(self.dirty | other.dirty, self.open | other.open, groups, self.preset | other.preset)


class RegisterFlight:
    """The analysis of one entry.

    touches[i]: registers of operation i that a product under way may own. unfenced[i]: registers of product
    i that may have been used without a fence since; preset[i]: those for which that matters if it adds.
    """

    def __init__(self, operations: list[Operation], starts: list[int], permissive: bool = False):
        self.operations, self.starts, self.permissive = operations, starts, permissive
        self.effects = [operation.effect for operation in operations]
        self.products = [i for i, e in enumerate(self.effects) if e is not None and e.kind == "product"]
        self.touches: dict[int, list[Register]] = {}
        self.unfenced: dict[int, list[Register]] = {}
        self.preset: dict[int, list[Register]] = {}
        if not self.products:
            return
        self._number_registers()
        self.owned: dict[int, int] = {0: 0}
        self._solve()

    # Registers and products as bits.

    def _number_registers(self) -> None:
        """Give a bit to each register that matters: of a product, or copied into one that is."""
        wanted = {r for i in self.products for r in (*self.effects[i].d, *self.effects[i].a)}
        moves = [o for o in self.operations if _is_move(o)]
        grown = True
        while grown:
            before = len(wanted)
            for operation in moves:
                if wanted.intersection(operation.writes):
                    wanted.update(operation.copies)
            grown = len(wanted) > before
        self.numbers = {register: k for k, register in enumerate(wanted)}
        self.names = list(wanted)
        self.reads = [self._bits((*o.reads, *o.copies)) for o in self.operations]
        self.writes = [self._bits(o.writes) for o in self.operations]
        self.copies = [self._bits(o.copies) if _is_move(o) else 0 for o in self.operations]
        self.number_of = {i: k for k, i in enumerate(self.products)}
        self.d = [self._bits(self.effects[i].d) for i in self.products]
        self.a = [self._bits(self.effects[i].a) for i in self.products]

    def _bits(self, registers: tuple[Register, ...] | list[Register]) -> int:
        bits = 0
        for register in registers:
            if register in self.numbers:
                bits |= 1 << self.numbers[register]
        return bits

    def _registers(self, bits: int) -> list[Register]:
        return [self.names[k] for k in range(bits.bit_length()) if bits >> k & 1]

    def _owned_by(self, products: int) -> int:
        """Bits of the registers of a set of products."""
        found = self.owned.get(products)
        if found is None:
            found = 0
            for k in range(products.bit_length()):
                if products >> k & 1:
                    found |= self.d[k] | self.a[k]
            self.owned[products] = found
        return found

    # Dataflow.

    def _solve(self) -> None:
        end = dict(zip(self.starts, [*self.starts[1:], len(self.operations)], strict=True))
        incoming = {0: State((1 << len(self.names)) - 1)}
        work = [0]
        while work:
            start = work.pop()
            state = incoming[start]
            for i in range(start, end[start]):
                state = self._after(i, state)
            for following in successors(self.operations, end[start]):
                have = incoming.get(following)
                merged = state if have is None else have.merged(state)
                if merged != have:
                    incoming[following] = merged
                    work.append(following)
        for start, state in incoming.items():
            for i in range(start, end[start]):
                self._collect(i, state)
                state = self._after(i, state)

    def _after(self, i: int, state: State) -> State:
        effect = self.effects[i]
        if effect is None:
            writes = self.writes[i]
            if self.permissive and _is_constant(self.operations[i]):
                return state._replace(preset=state.preset | writes)
            if not self.copies[i]:
                used = writes | self.reads[i]
                return state._replace(dirty=state.dirty | used) if used & ~state.dirty else state
            if self.copies[i] & state.dirty:
                return state._replace(dirty=state.dirty | writes)
            if self.copies[i] & state.preset:
                return state._replace(preset=state.preset | writes)
            guarded = self.operations[i].instruction.guard is not None
            if guarded:
                return state
            return state._replace(dirty=state.dirty & ~writes, preset=state.preset & ~writes)
        if effect.kind == "fence":
            return state._replace(dirty=0, preset=0)
        if effect.kind == "product":
            # What a product does not add to, it overwrites.
            number = self.number_of[i]
            return state._replace(open=state.open | 1 << number, preset=state.preset & ~self.d[number])
        if effect.kind == "commit":
            groups = (state.open, *state.groups)
            if len(groups) > DEPTH:
                groups = (*groups[: DEPTH - 1], groups[-2] | groups[-1])
            return State(state.dirty, 0, groups, state.preset)
        return state._replace(groups=state.groups[: effect.keep])

    def _collect(self, i: int, state: State) -> None:
        effect = self.effects[i]
        under_way = state.open
        for group in state.groups:
            under_way |= group
        if effect is None:
            bits = (self.reads[i] | self.writes[i]) & self._owned_by(under_way)
        elif effect.kind == "product":
            bits = self._conflicts(i, under_way)
            number = self.number_of[i]
            dirty = state.dirty & (self.d[number] | self.a[number]) | state.preset & self.a[number]
            preset = state.preset & self.d[number] & ~dirty
            if effect.form.keep is True:
                dirty, preset = dirty | preset, 0
            if dirty:
                self.unfenced[i] = self._registers(dirty)
            if preset and effect.form.keep is not False:
                self.preset[i] = self._registers(preset)
        else:
            return
        if bits:
            self.touches[i] = self._registers(bits)

    def _conflicts(self, i: int, under_way: int) -> int:
        """Registers of product i that others under way own and do not share with it."""
        mine, bits = self.number_of[i], 0
        for k in range(under_way.bit_length()):
            if under_way >> k & 1:
                same = self.effects[self.products[k]].d == self.effects[i].d
                bits |= self.a[mine] & self.d[k] | self.d[mine] & self.a[k]
                bits |= 0 if same else self.d[mine] & self.d[k]
        return bits

    # Checks while running.

    def tracked(self) -> set[Register]:
        """Registers whose uses must be noted while running."""
        suspects = [*self.unfenced.values(), *self.preset.values()]
        found = {register for registers in suspects for register in registers}
        grown = bool(found)
        while grown:
            before = len(found)
            for operation in self.operations:
                if _is_move(operation) and found.intersection(operation.writes):
                    found.update(r for r in operation.copies)
            grown = len(found) > before
        return found

    def instrument(self, steps: list[Step], layout: Layout) -> None:
        """Make the steps check what the analysis cannot clear."""
        clean = {register: layout.new_row(1) for register in self.tracked()}
        for i, (operation, step) in enumerate(zip(self.operations, steps, strict=True)):
            checks = []
            if i in self.touches:
                rows = frozenset(r.row for r in self.touches[i] if r.width == 32)
                checks.append(_untouched(rows, None if self.effects[i] is None else self.effects[i].form))
            if i in self.unfenced:
                checks.append(_fenced([(r.name, clean[r]) for r in self.unfenced[i]]))
            if i in self.preset:
                registers = [(r.name, clean[r]) for r in self.preset[i]]
                checks.append(_fenced(registers, self.effects[i].form.keep))
            note = _note(operation, clean, self.permissive)
            if checks or note is not None:
                step.run = _around(checks, step.run, note, step.kind == CONTROL)
                step.multiply = None


def _is_move(operation: Operation) -> bool:
    return operation.name == "mov" and bool(operation.copies)


def _is_constant(operation: Operation) -> bool:
    return operation.name == "mov" and not operation.copies


def _untouched(rows: frozenset[int], form: Form | None) -> Callable:
    return lambda m, g: m.part(Products).check_untouched(g, rows, form)


def _fenced(registers: list[tuple[str, int]], adds: tuple[int, bool] | None = None) -> Callable:
    """adds: the predicate under which it matters, None if it always does."""

    def check(m: Machine, g: Threads) -> None:
        for name, row in registers:
            clean = m.rows["pred"][row][g.index]
            if adds is not None:
                clean = clean | (m.rows["pred"][adds[0]][g.index] == adds[1])
            if not clean.all():
                k = int(np.flatnonzero(~clean.reshape(-1))[0])
                text = f"a product uses {name}, which something else used without a wgmma.fence since"
                raise m.fault(RegisterInFlight, g, k, text)

    return check


def _note(operation: Operation, clean: dict[Register, int], permissive: bool) -> Callable | None:
    """What keeps the clean-rows after an operation: a fence cleans, a use soils, a mov passes on.

    Permissive, a product cleans its accumulator, too.
    """
    effect = operation.effect
    product = effect is not None and effect.kind == "product"
    if not clean or (effect is not None and effect.kind != "fence" and not (product and permissive)):
        return None
    if effect is not None:
        everything = sorted(clean[r] for r in effect.d if r in clean) if product else sorted(clean.values())

        def fence(m: Machine, g: Threads) -> None:
            for row in everything:
                m.rows["pred"][row][g.index] = True

        return fence
    sources = [clean[r] for r in operation.copies if r in clean] if _is_move(operation) else []
    used = operation.writes if sources else [*operation.writes, *operation.reads, *operation.copies]
    targets = [clean[r] for r in used if r in clean]
    if not targets:
        return None

    def use(m: Machine, g: Threads) -> None:
        rows = m.rows["pred"]
        state: np.ndarray | bool = bool(sources)
        for row in sources:
            state = rows[row][g.index] & state
        for row in targets:
            rows[row][g.index] = state

    return use


def _around(checks: list[Callable], run: Callable, note: Callable | None, control: bool) -> Callable:
    def controlled(m: Machine, g: Threads, here: int) -> list:
        for check in checks:
            check(m, g)
        going = run(m, g, here)
        if note is not None:
            note(m, g)
        return going

    def plain(m: Machine, g: Threads) -> None:
        for check in checks:
            check(m, g)
        run(m, g)
        if note is not None:
            note(m, g)

    return controlled if control else plain
