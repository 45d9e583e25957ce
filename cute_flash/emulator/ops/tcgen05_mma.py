"""tcgen05 work that a single thread issues: mma, cp and commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError, TensorMemoryError, UnmodelledInstruction
from ..ptx.operands import Address, Vector
from ..translate.translation import Operation, operation
from ..units import descriptors
from ..units.bulk import issuers
from ..units.mbarrier import MBarriers
from ..units.tensor_formats import KINDS, form
from ..units.tensor_memory import split
from ..units.tensor_products import COPIES, Commit, Product, SharedToTensor, TensorUnit, group
from .mbarrier import Word
from .tcgen05 import cta_group

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

SCALES = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}
BLOCKS = {"block16": 16, "block32": 32}
USAGES = ("fill", "use", "lastuse", "discard")
NON_ZERO_MASK = 39  # bit of a zero-column mask descriptor; without it no column is left out


class _Value:
    """An operand's value in each thread: a 32- or 64-bit register, or a tensor memory address in brackets."""

    def __init__(self, x: Operation, position: int, view: str = "u32"):
        self.in_tensor_memory = isinstance(x.operand(position), Address)
        self.offset, self.view = 0, view
        if self.in_tensor_memory:
            self.row, self.view, self.offset = x.address(position)
            if self.view != "u32":
                raise x.unmodelled("a tensor memory address that is not a 32-bit register")
        else:
            self.row = x.source(position, view)

    def of(self, m: Machine, g: Threads) -> list[int]:
        """One int per thread."""
        values = m.rows[self.view][self.row][g.index].reshape(-1).tolist()
        return [v + self.offset & 0xFFFFFFFF for v in values] if self.offset else values


class _Mma:
    """The operands of one tcgen05.mma, or of one that is weight-stationary."""

    def __init__(self, x: Operation, stationary: bool):
        self.stationary = stationary
        self.ctas = cta_group(x)
        self.kind = x.one_of(*(f"kind::{name}" for name in KINDS)).removeprefix("kind::")
        self.scales = self._scales(x)
        if stationary and (self.ctas == 2 or self.scales):
            raise x.unmodelled(f".cta_group::{self.ctas} with kind::{self.kind}")
        buffers = [f"b{k}" for k in range(4)] if stationary else ["a"]
        usages = [f"collector::{buffer}::{usage}" for buffer in buffers for usage in USAGES]
        self.buffer, self.usage = x.one_of(*usages, default=usages[3]).split("::")[1:]
        self.where = x.instruction
        self.d, self.a = _Value(x, 0), _Value(x, 1, "u32" if self._bracketed(x) else "u64")
        self.b, self.descriptor = _Value(x, 2, "u64"), _Value(x, 3)
        if not self.d.in_tensor_memory:
            raise x.unmodelled("a D without brackets")
        position = 4
        self.factors = ()
        if self.scales:
            self.factors = _Value(x, 4), _Value(x, 5)
            position = 6
        self.mask: list[int] = []
        if isinstance(x.operand(position), Vector):
            if self.scales or stationary or len(x.vector(position)) != 4 * self.ctas:
                raise x.unmodelled("this disable-output-lane")
            self.mask = [x.source_of(item, "u32") for item in x.vector(position)]
            position += 1
        self.enable = x.predicate(position)
        self.shift, self.zero_columns = 0, None
        if stationary and x.count() > position + 1:
            self.zero_columns = _Value(x, position + 1, "u64")
        elif x.count() > position + 1:
            self.shift = x.integer(position + 1)
            if self.kind not in ("f16", "tf32") or not 0 <= self.shift <= 15:
                raise x.unmodelled(f"scale-input-d {self.shift} with kind::{self.kind}")

    @staticmethod
    def _bracketed(x: Operation) -> bool:
        return isinstance(x.operand(1), Address)

    def _scales(self, x: Operation) -> int:
        """Scale factors per row; 0 for kinds that are not block-scaled."""
        allowed = KINDS[self.kind].scales
        if x.flag("block_scale") != bool(allowed):
            raise x.unmodelled(f"kind::{self.kind} {'without' if allowed else 'with'} .block_scale")
        if not allowed:
            return 0
        default = {"mxf8f6f4": "block32", "mxf4": "block32"}.get(self.kind)
        name = x.one_of(*SCALES, *BLOCKS, default=default)
        count = SCALES.get(name) or KINDS[self.kind].k // BLOCKS[name]
        if count not in allowed:
            raise x.unmodelled(f".{name} with kind::{self.kind}")
        return count

    def products(self, m: Machine, g: Threads) -> list[Product]:
        """One product per thread."""
        enabled = (m.rows["pred"][self.enable[0]][g.index] ^ self.enable[1]).reshape(-1)
        columns = zip(
            issuers(g), self.d.of(m, g), self.a.of(m, g), self.b.of(m, g), self.descriptor.of(m, g),
            enabled.tolist(), strict=True,
        )  # fmt: skip
        masks = [m.rows["u32"][row][g.index].reshape(-1) for row in self.mask]
        factors = list(zip(*(f.of(m, g) for f in self.factors), strict=True)) or [(0, 0)] * g.size
        masks_of_b = self.zero_columns.of(m, g) if self.zero_columns is not None else []
        if any(word >> NON_ZERO_MASK & 1 for word in masks_of_b):
            raise UnmodelledInstruction("a zero-column mask that leaves columns of B out is not modelled")
        found = []
        for k, (issuer, d, a, b, word, enable) in enumerate(columns):
            one = form(word, self.kind, self.ctas, self.scales, self.stationary)
            ctas = group(m, issuer.cta, self.ctas)
            matrix = (b, False, one.b) if self.stationary else (a, self.a.in_tensor_memory, one.a)
            m.part(TensorUnit).collect(ctas[0], self.buffer, self.usage, matrix)
            locate = descriptors.locate
            where_a = a
            if not self.a.in_tensor_memory:
                where_a = locate(np.array([a], np.uint64), descriptors.TCGEN05, one.a.tile)
            where_b = locate(np.array([b], np.uint64), descriptors.TCGEN05, one.b.tile)
            skip = _lanes([int(words[k]) for words in masks], self.ctas) if masks else None
            keep = 2.0**-self.shift if enable else 0.0
            product = Product(issuer, ctas, self.where, one, d, where_a, where_b, keep, skip, factors[k])
            _check_lanes(product)
            found.append(product)
        return found


def _lanes(words: list[int], ctas: int) -> np.ndarray:
    """bool (ctas, 128): the lanes that a disable-output-lane mask names."""
    raw = np.array(words, np.uint32).view(np.uint8)
    return np.unpackbits(raw, bitorder="little").astype(bool).reshape(ctas, 128)


def _check_lanes(product: Product) -> None:
    """D and A begin in lane 0; rows in 16s may begin in lane 16."""
    one = product.form
    allowed = (0, 16) if one.a.tile.rows == 64 and one.ctas == 1 and not one.stationary else (0,)
    places = [("D", product.d)] + ([("A", product.a)] if isinstance(product.a, int) else [])
    for name, address in places:
        if split(address)[0] not in allowed:
            raise TensorMemoryError(f"{name} begins in lane {split(address)[0]} of tensor memory")
    if isinstance(product.a, int) and one.a.tile.bits == 8 and one.a.format not in ("e4m3", "e5m2"):
        raise EmulatorError(f"a matrix A of {one.a.format} in tensor memory is not modelled")


@operation("tcgen05.mma", "tcgen05.mma.ws")
def mma(x: Operation) -> Callable:
    """D = A B + D 2**-s in tensor memory; A in shared or tensor memory, B in shared memory.

    Weight-stationary ones (.ws) keep B in a collector buffer and spread D over all lanes.
    """
    operands = _Mma(x, x.name.endswith(".ws"))

    def step(m: Machine, g: Threads) -> None:
        for product in operands.products(m, g):
            product.begin(m)

    return step


@operation("tcgen05.cp")
def copy(x: Operation) -> Callable:
    """Rows of shared memory, described as a K-major matrix, to tensor memory."""
    ctas = cta_group(x)
    shape = x.one_of("128x256b", "128x128b", "64x128b", "32x128b")
    cast = x.one_of("warpx2::02_13", "warpx2::01_23", "warpx4", default="")
    name = f"{shape}.{cast}" if cast else shape
    if name not in COPIES:
        raise x.unmodelled(f".{name}")
    rows, width, quarters = COPIES[name]
    target, descriptor, where = _Value(x, 0), _Value(x, 1, "u64"), x.instruction
    tile = descriptors.Tile(rows, width, 8, copied=True)

    def step(m: Machine, g: Threads) -> None:
        for issuer, address, word in zip(issuers(g), target.of(m, g), descriptor.of(m, g), strict=True):
            lane, column = split(address)
            if lane:
                raise TensorMemoryError(f"tcgen05.cp to lane {lane}")
            chunks = descriptors.locate(np.array([word], np.uint64), descriptors.TCGEN05, tile)
            work = SharedToTensor(issuer, group(m, issuer.cta, ctas), where, quarters, column, chunks)
            work.begin(m)

    return step


@operation("tcgen05.commit")
def commit(x: Operation) -> Callable:
    """Let one arrival at an mbarrier follow the thread's earlier mma and cp; multicast: in several CTAs."""
    ctas = cta_group(x)
    x.one_of("mbarrier::arrive::one")
    space = x.one_of("shared::cluster")
    multicast = x.flag("multicast::cluster")
    x.type("b64")
    barrier, where = Word(x, 0, space), x.instruction
    mask = x.source(1, "u16") if multicast else None

    def step(m: Machine, g: Threads) -> None:
        masks = m.rows["u16"][mask][g.index].reshape(-1).tolist() if multicast else [None] * g.size
        for issuer, (cta, address), word in zip(issuers(g), barrier.places(m, g), masks, strict=True):
            if multicast:
                first = cta - int(m.rank[cta])
                if word >> m.cluster:
                    raise TensorMemoryError(f"a commit to CTAs {word:#x} of a cluster of {m.cluster}")
                targets = [first + rank for rank in range(m.cluster) if word >> rank & 1]
            else:
                targets = [cta]
            barriers = [m.part(MBarriers).find(target, address) for target in targets]
            unit = m.part(TensorUnit).commit(issuer)
            Commit(issuer, group(m, issuer.cta, ctas), where, unit, barriers).begin(m)

    return step
