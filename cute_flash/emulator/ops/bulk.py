"""cp.async.bulk and cp.reduce.async.bulk: bytes and tensor boxes, between global and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..core.memory import WINDOW_SHIFT, WINDOWS
from ..ptx.operands import Address, Register, Vector
from ..translate.translation import Operation, operation
from ..units import bulk, tensor_map
from ..units.bulk import BulkGroups
from ..units.mbarrier import MBarriers
from .mbarrier import Word
from .memory import Access

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

RANKS = tuple(f"{n}d" for n in range(1, 6))
SHARED = ("shared::cta", "shared::cluster")
REDUCTIONS = ("add", "min", "max", "and", "or", "xor")
TYPES = ("f16", "bf16", "f32", "f64", "u32", "s32", "u64", "s64", "b32", "b64")


class Box:
    """[map, {coordinates}]: a box of a tensor."""

    def __init__(self, x: Operation, position: int, rank: int):
        x.translation.global_granule = min(x.translation.global_granule, 2)  # elements of most tensors
        operand = x.operand(position)
        if not isinstance(operand, Address) or operand.offset or not isinstance(operand.base, Register):
            raise x.unmodelled("this kind of tensor address")
        coordinates = operand.coordinates[0] if operand.coordinates else None
        if not isinstance(coordinates, Vector) or len(coordinates.items) != rank:
            raise x.unmodelled(f"coordinates other than {rank} in braces")
        self.map = x.source_of(operand.base, "u64")
        self.coordinates = [x.source_of(item, "s32") for item in coordinates.items]
        self.rank = rank

    def of(self, m: Machine, g: Threads) -> list[tuple[tensor_map.TensorMap, tuple[int, ...]]]:
        """(map, coordinates) of each thread."""
        maps = _values(m, g, "u64", self.map)
        at = zip(*(_values(m, g, "s32", row) for row in self.coordinates), strict=True)
        decoded = [self._decoded(m, address) for address in maps]
        return [(map_, map_.place(place)) for map_, place in zip(decoded, at, strict=True)]

    def _decoded(self, m: Machine, address: int) -> tensor_map.TensorMap:
        known = tensor_map.decode(_map_bytes(m, address))
        if len(known.sizes) != self.rank:
            raise ValueError(f"a copy in {self.rank} dimensions with a tensor map of {len(known.sizes)}")
        return known


def _map_bytes(m: Machine, address: int) -> bytes:
    """The 64 meaningful bytes of a map at a generic address."""
    bulk.check_alignment("the tensor map's address", address, 64)
    offset = address - WINDOWS["param"]
    if address >> WINDOW_SHIFT == WINDOWS["param"] >> WINDOW_SHIFT and offset + 128 <= m.params.size:
        return m.params.bytes[offset : offset + 64].tobytes()
    return bulk.global_bytes(m, address, 128)[:64].tobytes()


def _values(m: Machine, g: Threads, view: str, row: int) -> list[int]:
    return np.broadcast_to(m.rows[view][row][g.index], g.shape).reshape(-1).tolist()


def _spaces(x: Operation) -> tuple[str, str]:
    """(destination, source) state spaces."""
    found = [name for name in x.modifiers if name in (*SHARED, "global")]
    if len(found) != 2 or ("global" in found and found.count("global") == 2):
        raise x.unmodelled("copies other than between global and shared memory")
    for name in found:
        x.modifiers.remove(name)
    return found[0], found[1]


def _hint(x: Operation, position: int) -> None:
    """An L2 cache policy changes no result."""
    if x.flag("L2::cache_hint"):
        x.source(position, "u64")


class Targets:
    """Where a load goes and which barriers it signals.

    multicast: the same place in every CTA of a mask. With .cta_group::2 a CTA's signal goes to that CTA of
    its pair whose parity the barrier's address names.
    """

    def __init__(self, x: Operation, space: str, barrier: int, mask: int):
        self.remote = space == "shared::cluster"
        self.address = Access(x, 0, "shared", 16)
        self.barrier = Word(x, barrier, "shared::cluster")
        self.pair = x.one_of("cta_group::1", "cta_group::2", default="") == "cta_group::2"
        self.mask = x.source(mask, "u16") if x.flag("multicast::cluster") else None

    def of(self, m: Machine, g: Threads) -> list[list[bulk.Signal]]:
        """The targets of each thread."""
        ctas, addresses = m.place(g, self.address.of(m, g), self.remote)
        places = self.barrier.places(m, g)
        masks = None if self.mask is None else _values(m, g, "u16", self.mask)
        found = []
        for k, (cta, address) in enumerate(zip(ctas.tolist(), addresses.tolist(), strict=True)):
            first = int(g.cta[k]) - int(m.rank[g.cta[k]])
            to = [cta] if masks is None else [first + r for r in range(m.cluster) if masks[k] >> r & 1]
            at, word = places[k]
            found.append([self._signal(m, each, address, (cta, at, word)) for each in to])
        return found

    def _signal(self, m: Machine, cta: int, address: int, named: tuple[int, int, int]) -> bulk.Signal:
        """The copy into `cta`; named: the CTA of the first target, and that and address of the barrier."""
        own, at, word = named
        if self.mask is not None or self.pair:
            at = cta if not self.pair else (cta & ~1) | (at & 1)
        elif at != own:
            raise ValueError("a copy into one CTA that signals a barrier of another")
        barrier = m.part(MBarriers).find(at, word)
        return bulk.Signal(cta, address, barrier, barrier.phase)


@operation("cp.async.bulk.tensor")
def tensor(x: Operation) -> Callable:
    """Copy a box of a tensor to shared memory, or from it."""
    rank = int(x.one_of(*RANKS)[0])
    to, _ = _spaces(x)
    x.flag("tile")
    where = x.instruction
    if to == "global":
        return _box_store(x, rank, None)
    x.one_of("mbarrier::complete_tx::bytes")
    box = Box(x, 1, rank)
    targets = Targets(x, to, 2, 3)
    _hint(x, x.count() - 1)

    def step(m: Machine, g: Threads) -> None:
        for issuer, (map_, at), to in zip(bulk.issuers(g), box.of(m, g), targets.of(m, g), strict=True):
            for target in to:
                bulk.check_alignment("the shared address of a tensor copy", target.address, 128)
            bulk.BoxLoad(issuer, to, map_.nbytes, where, map_, at).begin(m)

    return step


@operation("cp.reduce.async.bulk.tensor")
def reduce_tensor(x: Operation) -> Callable:
    """Reduce a box in shared memory into a tensor; the tensor's format says what its elements are."""
    rank = int(x.one_of(*RANKS)[0])
    to, _ = _spaces(x)
    if to != "global":
        raise x.unmodelled("a reduction into shared memory")
    name = x.one_of(*REDUCTIONS)
    x.flag("tile")
    return _box_store(x, rank, name)


def _box_store(x: Operation, rank: int, reduction: str | None) -> Callable:
    x.one_of("bulk_group")
    box = Box(x, 0, rank)
    source, where = Access(x, 1, "shared", 16), x.instruction
    _hint(x, 2)

    def step(m: Machine, g: Threads) -> None:
        ctas, addresses = m.place(g, source.of(m, g), False)
        for issuer, (map_, at), address in zip(
            bulk.issuers(g), box.of(m, g), addresses.tolist(), strict=True
        ):
            bulk.check_alignment("the shared address of a tensor copy", address, 128)
            combine = None if reduction is None else bulk.Combine(reduction, map_.format)
            bulk.BoxStore(issuer, address, map_.nbytes, combine, where, tensor=map_, at=at).begin(m)

    return step


@operation("cp.async.bulk")
def copy(x: Operation) -> Callable:
    """Copy consecutive bytes: global to shared, shared to global, or to another CTA's shared memory."""
    to, source = _spaces(x)
    if to == "global":
        x.one_of("bulk_group")
        return _bytes_store(x, None)
    x.one_of("mbarrier::complete_tx::bytes")
    where = x.instruction
    origin = Access(x, 1, "global" if source == "global" else "shared", 16)
    size = x.source(2, "u32")
    targets = Targets(x, to, 3, 4)
    _hint(x, x.count() - 1)

    def step(m: Machine, g: Threads) -> None:
        sizes, origins = _values(m, g, "u32", size), origin.of(m, g)
        if source != "global":
            _, origins = m.place(g, origins, False)
        rows = zip(bulk.issuers(g), targets.of(m, g), sizes, origins.tolist(), strict=True)
        kind = bulk.BytesLoad if source == "global" else bulk.SharedLoad
        for issuer, to, nbytes, address in rows:
            _check_bytes(nbytes, address, *(target.address for target in to))
            kind(issuer, to, nbytes, where, address).begin(m)

    return step


@operation("cp.reduce.async.bulk")
def reduce_copy(x: Operation) -> Callable:
    """Reduce consecutive elements in shared memory into global memory."""
    to, _ = _spaces(x)
    if to != "global":
        raise x.unmodelled("a reduction into shared memory")
    name = x.one_of(*REDUCTIONS)
    x.one_of("bulk_group")
    x.flag("noftz")
    return _bytes_store(x, bulk.Combine(name, x.type(*TYPES)))


def _bytes_store(x: Operation, combine: bulk.Combine | None) -> Callable:
    target, source, where = Access(x, 0, "global", 16), Access(x, 1, "shared", 16), x.instruction
    size = x.source(2, "u32")
    _hint(x, 3)

    def step(m: Machine, g: Threads) -> None:
        sizes = _values(m, g, "u32", size)
        _, addresses = m.place(g, source.of(m, g), False)
        rows = zip(bulk.issuers(g), sizes, addresses.tolist(), target.of(m, g).tolist(), strict=True)
        for issuer, nbytes, address, to in rows:
            _check_bytes(nbytes, address, to)
            bulk.BytesStore(issuer, address, nbytes, combine, where, target=to).begin(m)

    return step


def _check_bytes(nbytes: int, *addresses: int) -> None:
    bulk.check_alignment("the size of a bulk copy,", nbytes, 16)
    for address in addresses:
        bulk.check_alignment("an address of a bulk copy,", address, 16)


@operation("cp.async.bulk.commit_group")
def commit(x: Operation) -> Callable:
    """Close the thread's group of bulk stores."""
    return lambda m, g: m.part(BulkGroups).commit(g)


@operation("cp.async.bulk.wait_group")
def wait(x: Operation) -> Callable:
    """Wait until at most n of the youngest groups are pending; .read: until their sources have been read."""
    reading, keep = x.flag("read"), x.integer(0)
    return lambda m, g: m.part(BulkGroups).wait(g, keep, reading)


@operation("cp.async.bulk.prefetch", "prefetch.tensormap")
def prefetch(x: Operation) -> Callable:
    """Cache management: changes no result."""
    x.modifiers.clear()
    for position in range(x.count()):
        x.operand(position)
    return lambda m, g: None
