"""Bulk copies: blocks of bytes and boxes of tensors between global and shared memory, in the async proxy.

Loads signal an mbarrier with the bytes that they bring. Stores and reductions belong to groups that the
issuing thread commits and waits for; such a wait may be for the reading of their source alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import BarrierError, EmulatorError, Misaligned, OutOfBounds
from ..base.formats import bf16_to_f32, f32_to_bf16
from ..core.engine import Engine, Operation
from ..core.events import Order, Rows, Span, Unit
from ..core.machine import Machine, Part
from ..core.memory import POISON
from .mbarrier import MBarriers
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from ..core.events import Barrier
    from ..core.state import Threads
    from ..ptx.parse import Instruction

ALIGNMENT = {"tensor": 128, "bytes": 16}


class Issuer(NamedTuple):
    """The thread that starts a copy."""

    cta: int
    warp: int
    lane: int


class Signal(NamedTuple):
    """A place that a load fills and the barrier that it signals, in the phase it was issued in."""

    cta: int
    address: int
    barrier: Barrier
    phase: int


@dataclass(eq=False)
class Load(Operation):
    """A copy into shared memory. Subclasses say where the bytes come from."""

    issuer: Issuer
    targets: list[Signal]
    nbytes: int
    where: Instruction

    kind = "copy"

    def source(self, m: Machine) -> np.ndarray:
        """The bytes, uint8 (nbytes,)."""
        raise NotImplementedError

    def rows(self) -> Rows:
        """The places in global memory that it reads."""
        return Rows(np.zeros(0, np.int64), 0)

    def chunks(self, address: int) -> np.ndarray:
        """Where the 16-byte chunks of a copy to `address` go."""
        return np.arange(address, address + self.nbytes, 16)

    def begin(self, m: Machine) -> None:
        """Issue. The destinations hold nothing until the copy is done."""
        for target in self.targets:
            _check_span(m, target.address, self.nbytes)
            if m.watch is not None:
                warp = (self.issuer.cta, self.issuer.warp)
                m.watch.mbarrier_use(m, warp, target.barrier, True)
                m.watch.async_write(m, warp, target.barrier, Span(target.cta, target.address, self.nbytes))
            span = slice(target.address, target.address + self.nbytes)
            m.shared.bytes[target.cta, span] = POISON
            m.shared.written[target.cta, span] = 0
        if m.watch is not None:
            issuer = (self.issuer.cta, self.issuer.warp)
            m.watch.bulk_read(m, issuer, self.targets[0].barrier, self.rows())
        m.part(Engine).issue(self)

    def land(self, m: Machine) -> None:
        self.abandoned(m)
        data = self.source(m).reshape(-1, 16)
        for cta, address, barrier, phase in self.targets:
            at = self.chunks(address) // 16
            m.shared.bytes[cta].reshape(-1, 16)[at] = data
            m.shared.written[cta].reshape(-1, 16)[at] = 1
            if barrier.phase != phase:
                raise BarrierError(f"bytes of a copy issued in phase {phase} reach {barrier!r}")
            m.part(MBarriers).deliver(barrier, self.nbytes)

    def abandoned(self, m: Machine) -> None:
        for cta, *_ in self.targets:
            if not m.live[:, cta].any():
                raise EmulatorError(f"CTA {m.cta_name(cta)} exits while a copy into it is under way")


@dataclass(eq=False)
class BoxLoad(Load):
    """A box of a tensor."""

    tensor: TensorMap
    at: tuple[int, ...]

    def source(self, m: Machine) -> np.ndarray:
        return self.tensor.read(m.memory, self.at)

    def rows(self) -> Rows:
        return self.tensor.rows(self.at)

    def chunks(self, address: int) -> np.ndarray:
        return self.tensor.chunks(address)


@dataclass(eq=False)
class BytesLoad(Load):
    """Consecutive bytes of global memory."""

    address: int

    def source(self, m: Machine) -> np.ndarray:
        return global_bytes(m, self.address, self.nbytes)

    def rows(self) -> Rows:
        return Rows(np.array([self.address]), self.nbytes)


@dataclass(eq=False)
class SharedLoad(Load):
    """Consecutive bytes of the issuing CTA's shared memory, for another CTA of the cluster."""

    address: int

    def source(self, m: Machine) -> np.ndarray:
        return shared_bytes(m, self.issuer.cta, np.arange(self.address, self.address + self.nbytes, 16))

    def abandoned(self, m: Machine) -> None:
        super().abandoned(m)
        if not m.live[:, self.issuer.cta].any():
            name = m.cta_name(self.issuer.cta)
            raise EmulatorError(f"CTA {name} exits while a copy out of its shared memory is under way")


@dataclass(eq=False)
class Store(Operation):
    """A copy or a reduction from shared to global memory; combine: None for a copy."""

    issuer: Issuer
    address: int
    nbytes: int
    combine: Combine | None
    where: Instruction
    data: np.ndarray | None = None

    kind = "copy"

    def chunks(self) -> np.ndarray:
        """Where the 16-byte chunks of the source lie."""
        return np.arange(self.address, self.address + self.nbytes, 16)

    def begin(self, m: Machine) -> None:
        """Issue, into the group that the thread has open."""
        _check_span(m, self.address, self.nbytes)
        group = m.part(BulkGroups).join(self)
        if m.watch is not None:
            unit = m.part(BulkGroups).unit(self.issuer, group)
            m.watch.async_read(m, unit, self.issuer.cta, self.chunks(), 16)
            m.watch.bulk_write(m, unit, self.rows(), self.order)
        m.part(Engine).issue(self)

    @property
    def order(self) -> Order:
        """What observers are told of it."""
        update = self.combine is not None
        return Order(strong=update, update=update, sums=update and self.combine.sums)

    def read(self, m: Machine) -> None:
        """Take the source as it is now."""
        if self.data is None:
            self.data = shared_bytes(m, self.issuer.cta, self.chunks())

    def land(self, m: Machine) -> None:
        self.abandoned(m)
        self.read(m)
        self.write(m, self.data)

    def rows(self) -> Rows:
        """The places in global memory that it writes."""
        raise NotImplementedError

    def write(self, m: Machine, data: np.ndarray) -> None:
        """Bring the bytes to global memory."""
        raise NotImplementedError

    def abandoned(self, m: Machine) -> None:
        if self.data is None and not m.options.permissive and not m.live[:, self.issuer.cta].any():
            name = m.cta_name(self.issuer.cta)
            raise EmulatorError(f"CTA {name} exits while a copy out of its shared memory is under way")


@dataclass(eq=False)
class BoxStore(Store):
    """To a box of a tensor."""

    tensor: TensorMap | None = None
    at: tuple[int, ...] = ()

    def chunks(self) -> np.ndarray:
        return self.tensor.chunks(self.address)

    def rows(self) -> Rows:
        return self.tensor.rows(self.at)

    def write(self, m: Machine, data: np.ndarray) -> None:
        tensor = self.tensor
        inside = tensor.clip(self.at)
        if any(part.stop <= part.start for part in inside):
            return
        block = data.view(f"u{tensor.element}").reshape(tensor.box[::-1])[inside]
        target = tensor.view(m.memory, self.at, inside)
        target[...] = block if self.combine is None else self.combine(target, block)


@dataclass(eq=False)
class BytesStore(Store):
    """To consecutive bytes."""

    target: int = 0

    def rows(self) -> Rows:
        return Rows(np.array([self.target]), self.nbytes)

    def write(self, m: Machine, data: np.ndarray) -> None:
        target = global_bytes(m, self.target, self.nbytes)
        if self.combine is None:
            target[:] = data
        else:
            words = target.view(f"u{self.combine.size}")
            words[:] = self.combine(words, data.view(words.dtype))


class Combine:
    """A reduction on bit patterns. name: add, min, max, inc, dec, and, or, xor; kind: PTX type.

    sums: it adds floating-point numbers.
    """

    def __init__(self, name: str, kind: str):
        self.sums = name == "add" and "f" in kind
        self.kind, self.size = kind, int(kind.removeprefix("bf")[-2:]) // 8
        self.function = {
            "add": np.add, "min": np.minimum, "max": np.maximum,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        }[name]  # fmt: skip

    def __call__(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        if self.kind == "bf16":
            pair = (bf16_to_f32(np.ascontiguousarray(x)) for x in (old, new))
            return f32_to_bf16(self.function(*pair))
        dtype = {"f": "f", "s": "i", "u": "u", "b": "u"}[self.kind[0]] + str(self.size)
        pair = (np.ascontiguousarray(x).view(dtype) for x in (old, new))
        return np.ascontiguousarray(self.function(*pair)).view(old.dtype)


class BulkGroups(Part):
    """Groups of bulk stores, per thread."""

    def __init__(self, m: Machine):
        super().__init__(m)
        self.committed: dict[Issuer, int] = {}
        self.open: dict[Issuer, list[tuple[int, Store]]] = {}

    def join(self, store: Store) -> int:
        """Add a store to its thread's open group; the group's number, from 1."""
        number = self.committed.get(store.issuer, 0) + 1
        self.open.setdefault(store.issuer, []).append((number, store))
        return number

    def unit(self, issuer: Issuer, group: int) -> Unit:
        """The thread's copies as observers see them."""
        return Unit(issuer.cta, "bulk", issuer.warp * 32 + issuer.lane, group, issuer.warp)

    def commit(self, g: Threads) -> None:
        """Close the open group of every thread of `g`."""
        for issuer in issuers(g):
            self.committed[issuer] = self.committed.get(issuer, 0) + 1

    def wait(self, g: Threads, keep: int, reading: bool) -> None:
        """Finish all but the `keep` youngest committed groups, or only the reading of their sources."""
        m = self.machine
        for issuer in issuers(g) if self.open else ():
            last = self.committed.get(issuer, 0) - keep
            for number, store in self.open.get(issuer, ()):
                if number <= last and reading:
                    store.read(m)
                elif number <= last:
                    m.part(Engine).finish(store)
            if not reading and issuer in self.open:
                self.open[issuer] = [entry for entry in self.open[issuer] if entry[0] > last]
            if m.watch is not None and issuer in self.open:
                m.watch.unit_done(m, (issuer.cta, issuer.warp), self.unit(issuer, last))
                if not reading:
                    m.watch.bulk_written(m, (issuer.cta, issuer.warp), self.unit(issuer, last))


def issuers(g: Threads) -> list[Issuer]:
    """The threads of a set, one by one."""
    return [Issuer(*at) for at in zip(g.cta.tolist(), g.warp.tolist(), g.lane.tolist(), strict=True)]


def global_bytes(m: Machine, address: int, nbytes: int) -> np.ndarray:
    """Consecutive bytes of one allocation, where they lie."""
    region = m.memory.find(address)
    if region is None or address + nbytes > region.end:
        where = m.memory.describe(address if region is None else address + nbytes)
        raise OutOfBounds(f"a bulk copy touches [{address:#x}, {address + nbytes:#x}): {where}")
    return region.bytes[address - region.origin :][:nbytes]


def shared_bytes(m: Machine, cta: int, chunks: np.ndarray) -> np.ndarray:
    """The bytes of 16-byte chunks of a CTA's shared memory, in order; all must have been written."""
    at = chunks // 16
    if m.shared.strict and not m.shared.written[cta].reshape(-1, 16)[at].all():
        missing = m.shared.written[cta].reshape(-1, 16)[at] == 0
        k = int(np.flatnonzero(missing.any(axis=1))[0])
        raise m.shared.unwritten(int(chunks[k]) + int(np.flatnonzero(missing[k])[0]), m.cta_name(cta))
    return m.shared.bytes[cta].reshape(-1, 16)[at].reshape(-1)


def check_alignment(what: str, address: int, alignment: int) -> None:
    """Misaligned unless `address` is a multiple of `alignment`."""
    if address % alignment:
        raise Misaligned(f"{what} {address:#x} is not a multiple of {alignment}")


def _check_span(m: Machine, address: int, nbytes: int) -> None:
    if address < m.shared.base or address + nbytes > m.shared.end:
        limits = f"shared memory is [{m.shared.base}, {m.shared.end})"
        raise OutOfBounds(f"a bulk copy touches shared [{address}, {address + nbytes}): {limits}")
