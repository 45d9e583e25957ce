"""Tensor memory: 128 lanes of 512 columns of 32 bits, which columns hold what, and how warps reach them.

A tile of 128 rows lies one row to a lane. Warp w of a warpgroup reaches lanes 32 w to 32 w + 31 only, so a
thread of a warpgroup holds one whole row: no shuffle is ever needed to reduce it.

A tile of 64 rows takes 16 lanes of every 32, the first or the others, so that two of them lie side by side in
the same columns: row r in lane r // 16 * 32 + r % 16, or 16 further on (PTX ISA, data path layout F). Two
threads of a warp share a row of it, half of the columns each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import arith, llvm, nvvm, vector
from cutlass.cute.nvgpu import tcgen05

from ..common.numeric import both
from ..common.order import pin
from ..common.regions import Region, Regions

COLUMNS = 512  # of one multiprocessor
ROWS = 128
LANE = 65536  # from one lane to the next in a tensor memory address, whose low half is the column
HALF_LANES = 16  # of a warp's lanes: those that one of two tiles of 64 rows takes


@dataclass(frozen=True)
class Plan:
    """Who owns which columns: S, over it P, and O of every Q tile of a CTA.

        S[tile 0, slot 0]  S[tile 0, slot 1]  S[tile 1, slot 0]  ...  O[tile 0]  O[tile 1]

    tiles: Q tiles. slots: S's of a tile. tile_n: columns of S. dim_v: columns of O. bits: of an element of P.
    ValueError where they do not fit.
    """

    tiles: int
    slots: int
    tile_n: int
    dim_v: int
    bits: int = 16

    def __post_init__(self) -> None:
        self.regions  # noqa: B018

    @functools.cached_property
    def regions(self) -> Regions:
        """Their columns, of 32 bits."""
        scores, p = self.tiles * self.slots, self.tile_n * self.bits // 32
        return Regions(
            regions=(
                Region(name="s", size=self.tile_n, count=scores, filled="qk", read="softmax"),
                Region(name="p", size=p, count=scores, filled="softmax", read="pv", over="s"),
                Region(name="o", size=self.dim_v, count=self.tiles, filled="pv", read="correction"),
            ),
            steps=("qk", "softmax", "pv", "correction"),
            unit="columns of tensor memory",
            room=COLUMNS,
        )

    @property
    def used(self) -> int:
        return self.regions.used

    @property
    def allocated(self) -> int:
        """Columns to ask for: a power of two, at least 32."""
        return max(32, 1 << (self.used - 1).bit_length())

    def slot(self, turn: int | Int32) -> int | Int32:
        """Which S of a Q tile block number `turn` takes."""
        return 0 if self.slots == 1 else turn % self.slots

    def place(self, tile: int | Int32, turn: int | Int32) -> int | Int32:
        """Which of all S's a Q tile's block number `turn` takes."""
        return tile * self.slots + self.slot(turn)

    def s(self, tile: int | Int32, turn: int | Int32) -> int | Int32:
        """First column of S of a Q tile's block number `turn`."""
        return self.regions.at("s", self.place(tile, turn))

    def p(self, tile: int | Int32, turn: int | Int32) -> int | Int32:
        """First column of P of a Q tile's block number `turn`."""
        return self.regions.at("p", self.place(tile, turn))

    def o(self, tile: int | Int32) -> int | Int32:
        """First column of O of a Q tile."""
        return self.regions.at("o", tile)


def columns(base: cute.Pointer, first: int | Int32, count: int) -> cute.Tensor:
    """(128, count) 32-bit elements from column `first` on."""
    return cute.make_tensor(base + first, cute.make_layout((ROWS, count), stride=(LANE, 1)))


def registers(count: int, dtype: type = Float32) -> cute.Tensor:
    """(1, count): a thread's row."""
    return cute.make_rmem_tensor(cute.make_layout((1, count), stride=(count, 1)), dtype)


def some_columns(row: cute.Tensor, first: int, count: int) -> cute.Tensor:
    """A part of a thread's row."""
    return cute.make_tensor(row.iterator + first, cute.make_layout((1, count), stride=(count, 1)))


def times(row: cute.Tensor, factor: Float32, result: cute.Tensor) -> None:
    """result = row factor, both (1, n)."""
    for c in range(0, cute.size(row), 2):
        result[0, c], result[0, c + 1] = cute.arch.mul_packed_f32x2(
            (row[0, c], row[0, c + 1]), both(factor), rnd="rn", ftz=False
        )


def load(source: cute.Tensor, row: cute.Tensor, thread: Int32) -> None:
    """Read the row of a warpgroup's `thread` from (128, n) columns into (1, n) registers."""
    count = cute.size(row)
    atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(_repetition(count)), Float32)
    copy = tcgen05.make_tmem_copy(atom, source).get_slice(thread)
    cute.copy(copy, copy.partition_S(source), _as_copied(row))
    cute.arch.fence_view_async_tmem_load()
    pin(row)  # the compiler knows of no wait: nothing may read the registers before it


def load_with_max(source: cute.Tensor, row: cute.Tensor, thread: Int32) -> Float32:
    """`load`, and the row's maximum: what is NaN does not count, unless all of it is (`.max` as `fmax`).

    On sm_103a and sm_110a only (PTX ISA, tcgen05.ld.red).
    """
    count = cute.size(row)
    atom = cute.make_copy_atom(tcgen05.copy.LdRed32x32bOp(_repetition(count)), Float32)
    copy = tcgen05.make_tmem_copy(atom, source).get_slice(thread)
    maxima = registers(count // _each(count))
    reduced = cute.make_tensor(maxima.iterator, cute.make_layout(((1, 1), 1, cute.size(maxima))))
    cute.copy(copy, copy.partition_S(source), (_as_copied(row), reduced))
    cute.arch.fence_view_async_tmem_load()
    pin(row)
    pin(maxima)
    return functools.reduce(cute.arch.fmax, [maxima[0, i] for i in range(cute.size(maxima))])


def store(row: cute.Tensor, target: cute.Tensor, thread: Int32) -> None:
    """Write (1, n) registers to the thread's row of (128, n) columns; `stored` waits for it."""
    count = cute.size(row)
    atom = cute.make_copy_atom(tcgen05.St32x32bOp(_repetition(count)), Float32)
    copy = tcgen05.make_tmem_copy(atom, target).get_slice(thread)
    cute.copy(copy, _as_copied(row), copy.partition_D(target))


def load_shared(source: cute.Pointer, apart: int, row: cute.Tensor, thread: Int32) -> None:
    """Read (1, n) registers of a row of 64 rows that two threads share.

    source: of row 0. apart: columns between what the thread of the first 16 lanes and the other one take.
    """
    count, words = cute.size(row), _i32s(cute.size(row))
    shape, offset = nvvm.Tcgen05LdStShape.SHAPE_16X32BX2, _i64(apart)
    loaded = nvvm.tcgen05_ld(words, shape, _of_warp(source, thread), offset=offset)
    numbers = vector.bitcast(ir.VectorType.get([count], Float32.mlir_type), loaded)
    row.store(cute.TensorSSA(numbers, row.shape, Float32))
    cute.arch.fence_view_async_tmem_load()
    pin(row)


def store_shared(row: cute.Tensor, target: cute.Pointer, apart: int, thread: Int32) -> None:
    """Write (1, n) registers of a row of 64 rows that two threads share, likewise; `stored` waits for it."""
    shape, offset = nvvm.Tcgen05LdStShape.SHAPE_16X32BX2, _i64(apart)
    words = vector.bitcast(_i32s(cute.size(row)), row.load().ir_value())
    nvvm.tcgen05_st(shape, _of_warp(target, thread), words, offset=offset)


def stored() -> None:
    """Wait until what this thread stored is in tensor memory."""
    cute.arch.fence_view_async_tmem_store()


def _each(count: int) -> int:
    """Columns that one instruction moves: the largest power of two up to 32 that divides `count`."""
    return min(count & -count, 32)


def _repetition(count: int) -> tcgen05.Repetition:
    return tcgen05.Repetition(_each(count))


def _as_copied(row: cute.Tensor) -> cute.Tensor:
    """A row in the order of the copy's own partition: ((n, 1), 1, times)."""
    count = cute.size(row)
    each = _each(count)
    return cute.make_tensor(row.iterator, cute.make_layout(((each, 1), 1, count // each)))


def _of_warp(place: cute.Pointer, thread: Int32) -> ir.Value:
    """The same place in the lanes that a warp reaches, as instructions take it."""
    address = place.toint().to(Int32) + thread // 32 * (32 * LANE)
    return llvm.inttoptr(llvm.PointerType.get(6), address.ir_value())


def _i32s(count: int) -> ir.Type:
    return ir.VectorType.get([count], Int32.mlir_type)


def _i64(number: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(64), number)
