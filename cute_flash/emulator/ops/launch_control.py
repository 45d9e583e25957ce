"""clusterlaunchcontrol: a running cluster takes over the work of one that has not started.

The answer has 16 bytes: words ctaid.x, ctaid.y | ctaid.z << 16, and one whose bit 0 says whether a cluster is
named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError
from ..ptx.operands import Sink, Vector
from ..translate.translation import Operation, operation
from ..units import bulk
from ..units.mbarrier import MBarriers
from .mbarrier import Word
from .memory import Access

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

NBYTES = 16
# Read as signed it is no small negative number, which a kernel might take for "no tile" by chance.
POISON = np.uint32(0x7A7A7A7A)


@dataclass(eq=False)
class Answer(bulk.Load):
    """The answer to a request, on its way to the CTAs that wait for it."""

    def source(self, m: Machine) -> np.ndarray:
        cta = m.unlaunched.take(m.cluster)
        words = np.zeros(4, np.uint32)
        if cta < m.unlaunched.total:
            x, y, z = (int(v[0]) for v in m.coordinates(np.array([cta])))
            words[:] = x, y | z << 16, 1, 0
        else:
            m.refused.update(target.cta for target in self.targets)
        return words.view(np.uint8)


@operation("clusterlaunchcontrol.try_cancel")
def try_cancel(x: Operation) -> Callable:
    """Ask for a cluster that has not started; multicast: every CTA of this cluster gets the answer."""
    x.one_of("async")
    space = x.one_of("shared::cta")
    x.one_of("mbarrier::complete_tx::bytes")
    multicast = x.flag("multicast::cluster::all")
    x.type("b128")
    address, barrier, where = Access(x, 0, "shared", NBYTES), Word(x, 1, space), x.instruction

    def step(m: Machine, g: Threads) -> None:
        ctas, addresses = m.place(g, address.of(m, g), False)
        places = zip(bulk.issuers(g), ctas.tolist(), addresses.tolist(), barrier.places(m, g), strict=True)
        for issuer, cta, to, (_, word) in places:
            bulk.check_alignment("the address of an answer,", to, NBYTES)
            if cta in m.refused:
                raise EmulatorError(f"CTA {m.cta_name(cta)} asks again after the answer that nothing is left")
            first = cta - int(m.rank[cta])
            receivers = range(first, first + m.cluster) if multicast else [cta]
            barriers = [m.part(MBarriers).find(each, word) for each in receivers]
            targets = [bulk.Signal(b.cta, to, b, b.phase) for b in barriers]
            Answer(issuer, targets, NBYTES, where).begin(m)

    return step


@operation("clusterlaunchcontrol.query_cancel.is_canceled")
def is_canceled(x: Operation) -> Callable:
    """Whether the answer names a cluster."""
    x.type("pred")
    x.type("b128")
    d, a = x.dest(0, "pred"), x.source(1, "u64x2")

    def step(m: Machine, g: Threads) -> None:
        m.rows["pred"][d][g.index] = (m.rows["u64x2"][a][g.index][..., 1] & np.uint64(1)).astype(bool)

    return step


_FIELDS = {"x": (0, 0, 0xFFFFFFFF), "y": (0, 32, 0xFFFF), "z": (0, 48, 0xFFFF)}
_FIRST = "clusterlaunchcontrol.query_cancel.get_first_ctaid"


@operation(_FIRST, *(f"{_FIRST}::{axis}" for axis in _FIELDS))
def first_ctaid(x: Operation) -> Callable:
    """Coordinates of the first CTA of the cluster that the answer names; poison where it names none.

    The DSL asks for them before it looks whether there are any.
    """
    axis = x.name.removeprefix(_FIRST).removeprefix("::")
    if not axis:
        x.one_of("v4")
    x.type("b32")
    x.type("b128")
    items = x.vector(0) if isinstance(x.operand(0), Vector) else (x.operand(0),)
    if len(items) != (1 if axis else 4):
        raise x.unmodelled(f"{len(items)} destinations")
    dests = [(x.dest_of(item, "u32"), name) for item, name in zip(items, axis or "xyz", strict=False)]
    if not axis and not isinstance(items[3], Sink):
        raise x.unmodelled("a fourth coordinate")
    a = x.source(1, "u64x2")

    def step(m: Machine, g: Threads) -> None:
        words = m.rows["u64x2"][a][g.index]
        failed = words[..., 1] & np.uint64(1) == 0
        for d, name in dests:
            half, shift, mask = _FIELDS[name]
            value = words[..., half] >> np.uint64(shift) & np.uint64(mask)
            m.rows["u32"][d][g.index] = np.where(failed, POISON, value.astype(np.uint32))

    return step


@operation("mov.b128")
def mov(x: Operation) -> Callable:
    """Move 128 bits, pack {low, high} or unpack into them."""
    target, value = x.operand(0), x.operand(1)
    if isinstance(value, Vector):
        sources = [x.source_of(item, "u64") for item in value.items]
        x.only_moves()
        d = x.dest_of(target, "u64x2")

        def pack(m: Machine, g: Threads) -> None:
            for k, row in enumerate(sources):
                m.rows["u64x2"][d][(*g.index, ..., k)] = m.rows["u64"][row][g.index]

        return pack
    a = x.source_of(value, "u64x2")
    x.only_moves()
    if isinstance(target, Vector):
        dests = [x.dest_of(item, "u64") for item in target.items]

        def unpack(m: Machine, g: Threads) -> None:
            words = m.rows["u64x2"][a][g.index]
            for k, row in enumerate(dests):
                m.rows["u64"][row][g.index] = words[..., k]

        return unpack
    d = x.dest_of(target, "u64x2")

    def move(m: Machine, g: Threads) -> None:
        m.rows["u64x2"][d][g.index] = m.rows["u64x2"][a][g.index]

    return move
