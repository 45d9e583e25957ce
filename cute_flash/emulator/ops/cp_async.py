"""cp.async without mbarriers: copies from global to shared memory, groups and waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.events import Copy
from ..translate.translation import Operation, operation
from ..units.sync import AsyncCopies
from .memory import Access

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads


@operation("cp.async.ca.shared.global", "cp.async.cg.shared.global",
           "cp.async.ca.shared::cta.global", "cp.async.cg.shared::cta.global")  # fmt: skip
def copy(x: Operation) -> Callable:
    """Copy 4, 8 or 16 bytes; with a source size (or an ignore predicate) the rest becomes zero."""
    x.without_effect("L2::64B", "L2::128B", "L2::256B")
    hinted = x.flag("L2::cache_hint")
    last = x.count() - int(hinted)
    if hinted:
        x.source(last, "u64")
    size = x.integer(2)
    shared, source = Access(x, 0, "shared", size), Access(x, 1, "global", size)
    if size not in ((16,) if ".cg." in x.name else (4, 8, 16)):
        raise x.unmodelled(f"a copy of {size} bytes")
    filled, ignore, where = None, None, x.instruction
    if last == 4:
        operand = x.operand(3)
        if getattr(operand, "width", 32) == 1 or type(operand).__name__ == "Not":
            ignore = x.predicate(3)
        else:
            filled = x.source(3, "u32")

    def step(m: Machine, g: Threads) -> None:
        used = np.full(g.size, size)
        if filled is not None:
            used = m.rows["u32"][filled][g.index].reshape(-1).astype(np.int64)
            if (used > size).any():
                raise m.fault(ValueError, g, int(np.argmax(used)), f"a source size above {size}")
        elif ignore is not None:
            drop = m.rows["pred"][ignore[0]][g.index].reshape(-1) ^ ignore[1]
            used = np.where(drop, 0, size)
        cta, place = m.place(g, shared.of(m, g), False)
        m.part(AsyncCopies).issue(g, Copy(g.flat, cta, place, source.of(m, g), used, size, where))

    return step


@operation("cp.async.commit_group")
def commit(x: Operation) -> Callable:
    """Close the group of the copies issued so far."""
    return lambda m, g: m.part(AsyncCopies).commit(g)


@operation("cp.async.wait_group", "cp.async.wait_all")
def wait(x: Operation) -> Callable:
    """Wait until at most n of the youngest groups are pending; wait_all waits for every copy."""
    keep = x.integer(0) if x.name.endswith("group") else None
    return lambda m, g: m.part(AsyncCopies).wait(g, keep)
