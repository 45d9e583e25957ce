"""wgmma: asynchronous products of a warpgroup of four warps, with fence, commit_group and wait_group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import WarpgroupError
from ..base.formats import matrix_bits
from ..core.code import Step
from ..core.state import LANES
from ..ptx.constants import known_predicate
from ..ptx.operands import Register
from ..translate.translation import Effect, Operation, operation
from ..units.descriptors import Tile
from ..units.products import ROWS, Form
from ..units.warpgroup import Products

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

SHAPES = {f"m64n{n}k{k}": (n, k) for n in range(8, 257, 8) for k in (16, 32)}
BYTES = ("e4m3", "e5m2")
HALVES = ("f16", "bf16")


@operation("wgmma.mma_async.sync.aligned")
def mma_async(x: Operation) -> Step:
    """D = A B (+ D where scale-d holds): A in registers or shared memory, B in shared memory."""
    n, k = SHAPES[x.one_of(*SHAPES)]
    result, kinds = x.type("f32", "f16"), (x.type(*HALVES, *BYTES), x.type(*HALVES, *BYTES))
    narrow = kinds[0] in BYTES
    mixed = kinds[0] != kinds[1] and not (narrow and kinds[1] in BYTES)
    if mixed or k != (32 if narrow else 16) or (result == "f16" and "bf16" in kinds):
        raise x.unmodelled(f".m64n{n}k{k}.{result}.{'.'.join(kinds)}")
    keep = known_predicate(x.translation.entry, x.operand(3))
    d = _accumulator(x, n // 4 if result == "f16" else n // 2, keep)
    if keep is None:
        keep = x.predicate(3)
    a_items, a, descriptor = _left(x)
    sign, transposed = _immediates(x, a is not None, narrow)
    bits = [matrix_bits(kind) for kind in kinds]
    tiles = Tile(ROWS, k, bits[0], transposed[0]), Tile(n, k, bits[1], transposed[1])
    descriptors = descriptor, x.source(2, "u64")
    form = Form(d, a, descriptors, tiles, kinds, sign, result == "f16", keep, x.instruction)
    x.effect = Effect("product", tuple(x.vector(0)), a_items, form)
    return x.converged(_issue(form))


def _accumulator(x: Operation, count: int, keep: bool | None) -> np.ndarray:
    """Rows of D.

    D counts as read only where it is known to be added to: what the first product of a sum finds there is
    never used. Adding to an undefined D gives NaN where the predicate is not known.
    """
    items = x.vector(0)
    if len(items) != count:
        raise x.unmodelled(f"{len(items)} accumulator registers, not {count},")
    rows = np.array([x.dest_of(item, "u32") for item in items])
    if len(set(rows.tolist())) != count or not all(isinstance(item, Register) for item in items):
        raise x.unmodelled("an accumulator that names a register twice")
    if keep is True:
        x.reads += items
    return rows


def _left(x: Operation) -> tuple[tuple[Register, ...], np.ndarray | None, int | None]:
    """(registers of A, their rows or None, row of A's descriptor or None)."""
    items = x.vector(1)
    if len(items) == 1:
        return (), None, x.source(1, "u64")
    if len(items) != 4 or not all(isinstance(item, Register) for item in items):
        raise x.unmodelled(f"{len(items)} registers of A")
    return items, np.array([x.source_of(item, "u32") for item in items]), None


def _immediates(x: Operation, in_registers: bool, narrow: bool) -> tuple[int, tuple[bool, bool]]:
    """(sign of the product, (A is M-major, B is N-major))."""
    scales = x.integer(4), x.integer(5)
    if not set(scales) <= {1, -1}:
        raise x.unmodelled(f"scale-a, scale-b {scales}")
    flags = [x.integer(position) for position in range(6, x.count())]
    if len(flags) != (0 if narrow else 1 if in_registers else 2) or not set(flags) <= {0, 1}:
        raise x.unmodelled(f"the list {flags} of trans-a, trans-b")
    transposed = (0, 0) if narrow else (0, *flags) if in_registers else tuple(flags)
    return scales[0] * scales[1], (bool(transposed[0]), bool(transposed[1]))


def _issue(form: Form) -> Callable:
    def step(m: Machine, g: Threads) -> None:
        a = None if form.a is not None else _per_warp(m, g, "u64", form.descriptors[0])
        b = _per_warp(m, g, "u64", form.descriptors[1])
        if isinstance(form.keep, bool):
            keep = np.full(g.warps, form.keep)
        else:
            keep = _per_warp(m, g, "pred", form.keep[0]) ^ form.keep[1]
        m.part(Products).issue(g, form, (a, b, keep))

    return step


def _per_warp(m: Machine, g: Threads, view: str, row: int) -> np.ndarray:
    """One value per warp of a set of whole warps; its lanes must agree."""
    values = m.rows[view][row][g.index].reshape(-1, LANES)
    first = values[:, 0]
    if np.count_nonzero(values != values[:, :1]):
        k = int(np.flatnonzero((values != values[:, :1]).any(axis=1))[0])
        raise m.warp_fault(WarpgroupError, g, k, "lanes of one warp give different descriptors or scales")
    return first.copy()


@operation("wgmma.fence.sync.aligned")
def fence(x: Operation) -> Step:
    """Order the accesses to registers before products that use them: see register_flight.py."""
    x.effect = Effect("fence")
    return x.converged(lambda m, g: m.part(Products).check_warpgroups(g))


@operation("wgmma.commit_group.sync.aligned")
def commit_group(x: Operation) -> Step:
    """Close the group of the products issued so far."""
    x.effect = Effect("commit")
    return x.converged(lambda m, g: m.part(Products).commit(g))


@operation("wgmma.wait_group.sync.aligned")
def wait_group(x: Operation) -> Step:
    """Wait until at most n of the youngest groups are under way."""
    keep = x.integer(0)
    x.effect = Effect("wait", keep=keep)

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        ready, late = m.whole_warps(g, here)
        if ready is None:
            return late
        return late + m.part(Products).wait(ready, keep, here)

    return x.control(step)
