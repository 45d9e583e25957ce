"""The unit that works on tensor memory: products, copies from shared memory, and the commits behind them.

What one CTA (or pair) issues is one queue: it happens in that order. A commit's turn is an arrival at an
mbarrier. Each issuing thread counts its commits: what it issues belongs to the epoch that its next commit
ends, and only to that, since a commit speaks for its own thread's work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError, TensorMemoryError
from ..core.engine import Engine, Operation
from ..core.events import Columns, Unit
from ..core.machine import Machine, Part
from . import descriptors
from .bulk import Issuer
from .mbarrier import MBarriers
from .tensor_formats import Form, Matrix, Piece, from_words, numbers, pieces, scale_factors
from .tensor_memory import LANES, QUARTER, TensorMemory, split

if TYPE_CHECKING:
    from ..core.events import Barrier
    from ..ptx.parse import Instruction

EVERY_LANE = slice(0, LANES)


class TensorUnit(Part):
    """Per wave: how many commits each thread has made, and what the collector buffer of each CTA holds."""

    def __init__(self, m: Machine):
        super().__init__(m)
        self.epochs: dict[Issuer, int] = {}
        self.collector: dict[tuple[int, str], tuple] = {}  # (cta, name of the buffer) -> matrix

    def unit(self, issuer: Issuer) -> Unit:
        """A thread's work since its last commit, as observers see it."""
        number = issuer.warp * QUARTER + issuer.lane
        return Unit(issuer.cta, "tensor", number, self.epochs.setdefault(issuer, 1), issuer.warp)

    def commit(self, issuer: Issuer) -> Unit:
        """End an epoch; the work that it holds."""
        unit = self.unit(issuer)
        self.epochs[issuer] += 1
        return unit

    def collect(self, cta: int, buffer: str, usage: str, matrix: tuple) -> None:
        """Apply .collector::buffer::usage. Raises where a use has no fill with the same matrix before it."""
        if usage in ("use", "lastuse") and self.collector.get((cta, buffer)) != matrix:
            name = buffer[0].upper()
            text = f".collector::{buffer}::{usage} of a matrix {name} that no product has filled in"
            raise TensorMemoryError(text)
        if usage == "fill":
            self.collector[cta, buffer] = matrix
        elif usage != "use":
            self.collector.pop((cta, buffer), None)


def group(m: Machine, cta: int, ctas: int) -> list[int]:
    """The CTAs that work together: one, or the even and the odd one of a pair."""
    if ctas == 1:
        return [cta]
    if m.cluster % 2:
        raise TensorMemoryError(f"CTA {m.cta_name(cta)} has no peer: its cluster has odd size")
    even = cta - int(m.rank[cta]) % 2
    for each in (even, even + 1):
        if not m.live[:, each].any():
            raise TensorMemoryError(f"CTA {m.cta_name(each)} of the pair has exited")
    return [even, even + 1]


def _fault(m: Machine, ctas: list[int]) -> Callable:
    """How descriptors.read makes errors."""

    def fault(kind: type[EmulatorError], tile: int, text: str) -> EmulatorError:
        return kind(f"{text} (CTA {m.cta_name(ctas[tile])})")

    return fault


@dataclass(eq=False)
class Work(Operation):
    """What the unit does for a thread. ctas: in whose memories; queue: that of the first of them."""

    issuer: Issuer
    ctas: list[int]
    where: Instruction

    kind = "product"

    @property
    def queue(self) -> tuple:
        return "tensor", self.ctas[0]

    def abandoned(self, m: Machine) -> None:
        for cta in self.ctas:
            if not m.live[:, cta].any():
                raise EmulatorError(f"CTA {m.cta_name(cta)} exits while tensor work of its is under way")


@dataclass(eq=False)
class Commit(Work):
    """An arrival at mbarriers once the thread's earlier work is done.

    A CTA may exit before its own last commits have arrived: nobody waits for them any more. Permissive,
    before another's, too.
    """

    unit: Unit
    barriers: list[Barrier]

    def begin(self, m: Machine) -> None:
        """Issue."""
        for barrier in self.barriers:
            if m.watch is not None:
                m.watch.mbarrier_use(m, (self.issuer.cta, self.issuer.warp), barrier, True)
        if m.watch is not None:
            m.watch.unit_commit(m, self.unit)
        m.part(Engine).issue(self)

    def abandoned(self, m: Machine) -> None:
        for barrier in self.barriers if not m.options.permissive else ():
            if barrier.cta != self.issuer.cta and not m.live[:, barrier.cta].any():
                raise EmulatorError(f"CTA {m.cta_name(barrier.cta)} exits before a commit has reached it")

    def land(self, m: Machine) -> None:
        self.abandoned(m)
        for barrier in self.barriers:
            if m.watch is not None:
                m.watch.unit_arrive(m, self.unit, barrier)
            m.part(MBarriers).arrive(barrier, 1, None)


@dataclass(eq=False)
class Product(Work):
    """One tcgen05.mma. a: descriptor's chunks or, in tensor memory, an address; b: chunks; all (1, …).

    keep: factor of what D holds (0: nothing is added); skip: lanes of D that stay, bool (ctas, LANES).
    scales: addresses of the scale factors of A and B.
    """

    form: Form
    d: int
    a: np.ndarray | int
    b: np.ndarray
    keep: float
    skip: np.ndarray | None = None
    scales: tuple[int, int] = (0, 0)
    pieces: tuple[Piece, ...] = field(init=False)

    def __post_init__(self) -> None:
        form = self.form
        self.pieces = pieces(form.a.tile.rows, form.ctas, form.n, form.stationary)

    def begin(self, m: Machine) -> None:
        """Issue, after the checks that do not depend on when it happens."""
        for cta in self.ctas:
            self._check_columns(m, cta)
            for chunks in self._chunks():
                descriptors.check_bounds(m.shared, chunks, _fault(m, [cta]))
        if m.watch is not None:
            self._announce(m)
        m.part(Engine).issue(self)

    def _check_columns(self, m: Machine, cta: int) -> None:
        """Everything must be allocated, when the product is issued and still when it happens."""
        for columns, _ in self._columns(cta):
            m.part(TensorMemory).check_columns(cta, columns.first, columns.count, "tcgen05.mma")

    def _chunks(self) -> list[np.ndarray]:
        return [self.b] if isinstance(self.a, int) else [self.a, self.b]

    def _columns(self, cta: int) -> list[tuple[Columns, bool]]:
        """What it touches of a CTA's tensor memory: (columns, whether they are written)."""
        form, found = self.form, []
        lane, first = split(self.d)
        for piece in self.pieces:
            count = piece.columns.stop - piece.columns.start
            lanes = slice(piece.lanes.start + lane, piece.lanes.stop + lane)
            found.append((Columns(cta, lanes, first, count), True))
        if isinstance(self.a, int):
            lane, first = split(self.a)
            for piece in self.pieces:
                lanes = slice(piece.lanes.start + lane, piece.lanes.stop + lane)
                count = form.a.tile.k * form.a.tile.bits // 32
                found.append((Columns(cta, lanes, first, count), False))
        if form.scales:
            for address, rows in zip(self.scales, (form.a.tile.rows, form.n), strict=True):
                count = -(-rows // QUARTER)
                found.append((Columns(cta, EVERY_LANE, split(address)[1], count), False))
        return found

    def _announce(self, m: Machine) -> None:
        unit = m.part(TensorUnit).unit(self.issuer)
        for cta in self.ctas:
            for chunks in self._chunks():
                m.watch.async_read(m, unit, cta, chunks.reshape(-1), descriptors.CHUNK)
            for columns, written in self._columns(cta):
                m.watch.tensor_work(m, unit, columns, written)

    def land(self, m: Machine) -> None:
        form = self.form
        b = np.concatenate([self._operand(m, cta, self.b, form.b) for cta in self.ctas])
        for number, cta in enumerate(self.ctas):
            self._check_columns(m, cta)
            skip = None if self.skip is None else self.skip[number]
            scaled = self._scale_b(m, cta, b) if form.scales else b
            a = None if isinstance(self.a, int) else self._operand(m, cta, self.a, form.a)
            if a is not None and form.scales:
                a = self._scale_a(m, cta, a)
            for piece in self.pieces:
                rows = self._from_tensor_memory(m, cta, piece) if a is None else a[piece.rows]
                self._accumulate(m, cta, piece, rows @ scaled[piece.columns].T, skip)

    def _operand(self, m: Machine, cta: int, chunks: np.ndarray, matrix: Matrix) -> np.ndarray:
        """A matrix in a CTA's shared memory, float32 (rows, k)."""
        raw = descriptors.read(m.shared, np.array([cta]), chunks, matrix.tile, _fault(m, [cta]))
        return numbers(raw[0], matrix)

    def _from_tensor_memory(self, m: Machine, cta: int, piece: Piece) -> np.ndarray:
        """Rows of A in the lanes of a piece."""
        form = self.form
        lane, first = split(self.a)
        lanes = slice(piece.lanes.start + lane, piece.lanes.stop + lane)
        columns = slice(first, first + form.a.tile.k * form.a.tile.bits // 32)
        m.part(TensorMemory).check_written(cta, lanes, columns, "tcgen05.mma")
        a = from_words(m.part(TensorMemory).words[cta, lanes, columns], form.a)
        return self._scale_a(m, cta, a) if form.scales else a

    def _scale_a(self, m: Machine, cta: int, a: np.ndarray) -> np.ndarray:
        """A times its scale factors: those of row r lie in lane r, column r / 32."""
        row = np.arange(len(a))
        words = self._scale_words(m, cta, row, split(self.scales[0])[1] + row // QUARTER)
        return _scaled(a, scale_factors(words, self.form.a, self.form))

    def _scale_b(self, m: Machine, cta: int, b: np.ndarray) -> np.ndarray:
        """B times its scale factors: those of column n in lane n % 32 of every quarter, column n / 32."""
        n, first = np.arange(len(b)), split(self.scales[1])[1]
        lanes = n % QUARTER + np.arange(0, LANES, QUARTER)[:, None]
        words = self._scale_words(m, cta, lanes, first + n // QUARTER + 0 * lanes)
        factors = scale_factors(words, self.form.b, self.form).reshape(4, len(b), -1)
        if not np.array_equal(factors, np.broadcast_to(factors[0], factors.shape), equal_nan=True):
            text = f"the lane quarters of CTA {m.cta_name(cta)} hold different scale factors of B"
            raise TensorMemoryError(f"{text} from column {first} on")
        return _scaled(b, factors[0])

    def _scale_words(self, m: Machine, cta: int, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Words that hold scale factors."""
        tensor = m.part(TensorMemory)
        missing = ~tensor.written[cta, lanes, columns]
        if tensor.strict and missing.any():
            raise tensor.unwritten("tcgen05.mma", cta, int(lanes[missing][0]), int(columns[missing][0]))
        return tensor.words[cta, lanes, columns]

    def _accumulate(
        self, m: Machine, cta: int, piece: Piece, product: np.ndarray, skip: np.ndarray | None
    ) -> None:
        """Write a piece of D."""
        lane, first = split(self.d)
        lanes = slice(piece.lanes.start + lane, piece.lanes.stop + lane)
        columns = slice(first, first + product.shape[1])
        tensor = m.part(TensorMemory)
        place = tensor.words[cta, lanes, columns]
        if self.keep:
            tensor.check_written(cta, lanes, columns, "tcgen05.mma")
            have = place.astype(np.uint16).view(np.float16) if self.form.half else place.view(np.float32)
            product += have if self.keep == 1 else have * np.float32(self.keep)
        words = product.view(np.uint32)
        if self.form.half:
            words = product.astype(np.float16).view(np.uint16).astype(np.uint32)
        if skip is None:
            place[...] = words
            tensor.written[cta, lanes, columns] = True
            return
        stays = skip[lanes]
        place[~stays] = words[~stays]
        tensor.written[cta, lanes, columns][~stays] = True


def _scaled(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Rows of values in as many blocks as there are factors, each block times its factor."""
    blocks = values.reshape(*factors.shape, -1) * factors[:, :, None]
    return blocks.reshape(values.shape)


# shape and multicast -> (rows, bytes per row, lane quarters that each quarter of the rows goes to)
COPIES = {
    "128x256b": (128, 32, ((0,), (1,), (2,), (3,))),
    "128x128b": (128, 16, ((0,), (1,), (2,), (3,))),
    "64x128b.warpx2::02_13": (64, 16, ((0, 2), (1, 3))),
    "64x128b.warpx2::01_23": (64, 16, ((0, 1), (2, 3))),
    "32x128b.warpx4": (32, 16, ((0, 1, 2, 3),)),
}


@dataclass(eq=False)
class SharedToTensor(Work):
    """One tcgen05.cp: rows of shared memory to lanes. chunks: (1, rows, bytes per row / 16)."""

    quarters: tuple[tuple[int, ...], ...]
    column: int
    chunks: np.ndarray

    def begin(self, m: Machine) -> None:
        """Issue."""
        unit = m.part(TensorUnit).unit(self.issuer)
        for cta in self.ctas:
            columns = Columns(cta, EVERY_LANE, self.column, 4 * self.chunks.shape[2])
            m.part(TensorMemory).check_columns(cta, columns.first, columns.count, "tcgen05.cp")
            descriptors.check_bounds(m.shared, self.chunks, _fault(m, [cta]))
            if m.watch is not None:
                m.watch.async_read(m, unit, cta, self.chunks.reshape(-1), descriptors.CHUNK)
                m.watch.tensor_work(m, unit, columns, True)
        m.part(Engine).issue(self)

    def land(self, m: Machine) -> None:
        _, rows, width = self.chunks.shape
        tile = descriptors.Tile(rows, 4 * width, 32)
        columns = slice(self.column, self.column + 4 * width)
        tensor = m.part(TensorMemory)
        for cta in self.ctas:
            tensor.check_columns(cta, self.column, 4 * width, "tcgen05.cp")
            words = descriptors.read(m.shared, np.array([cta]), self.chunks, tile, _fault(m, [cta]))[0]
            for number, targets in enumerate(self.quarters):
                part = words[number * QUARTER : (number + 1) * QUARTER]
                for target in targets:
                    lanes = slice(target * QUARTER, (target + 1) * QUARTER)
                    tensor.words[cta, lanes, columns] = part
                    tensor.written[cta, lanes, columns] = True
