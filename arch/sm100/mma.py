"""Products of tiles with tcgen05: one warp begins them, tensor memory takes the results, in order.

Operands A of S = Q K and B of both products are read from shared memory through descriptors; P, the A of
O = P V, from tensor memory. Products of a CTA run in the order in which they were begun, so the next S may be
begun over P right after the product that reads P. A pair's products take the descriptors of the leader's part
of the operands: its peer has the other part at the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from ..common.operand import transposed
from .group import ALONE, Group
from .tmem import ROWS, Plan

K, MN = OperandMajorMode.K, OperandMajorMode.MN


SMEM, TMEM = tcgen05.OperandSource.SMEM, tcgen05.OperandSource.TMEM


def tiled_mma(
    dtype: type, count: int, a_in: tcgen05.OperandSource, b_major: OperandMajorMode, group: Group,
    a_major: OperandMajorMode = K, rows: int = ROWS, a_dtype: type | None = None,
) -> cute.TiledMma:
    """`rows` per CTA x count x 32 bytes; `b_major` is contiguous in B (count, k), `a_major` in A (rows, k).

    dtype: of both, or of B where A of 8 bits has another, `a_dtype`.
    """
    shape, places = (rows * group.ctas, count), (group.kind, a_in, a_major, b_major)
    if dtype.width == 8:
        types = a_dtype or dtype, dtype, Float32
        return cute.make_tiled_mma(tcgen05.MmaF8F6F4Op(*types, (*shape, 32), *places))
    return cute.make_tiled_mma(tcgen05.MmaF16BF16Op(dtype, Float32, (*shape, 16), *places))


@dataclass(frozen=True)
class Products:
    """The two products of attention, S = Q K and O += P V. plan: where their results are. group: of CTAs.

    dtype: of q, k and v. p_dtype: of P, of as many bits. A tiled product carries its accumulate flag along,
    so that each use makes its own.
    """

    dtype: type
    p_dtype: type
    plan: Plan
    group: Group

    def qk(self) -> cute.TiledMma:
        return tiled_mma(self.dtype, self.plan.tile_n, SMEM, K, self.group)

    def pv(self) -> cute.TiledMma:
        return tiled_mma(self.dtype, self.plan.dim_v, TMEM, MN, self.group, a_dtype=self.p_dtype)

    def own_qk(self) -> cute.ThrMma:
        """What partitions one CTA's part of the operands of `qk`: a product with just these."""
        return tiled_mma(self.dtype, self.plan.tile_n // self.group.ctas, SMEM, K, ALONE).get_slice(0)

    def own_pv(self) -> cute.ThrMma:
        """The same of `pv`."""
        columns = self.plan.dim_v // self.group.ctas
        return tiled_mma(self.dtype, columns, TMEM, MN, ALONE, a_dtype=self.p_dtype).get_slice(0)

    def q(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, rows, k, tiles) of (rows, dim, tiles)."""
        return self.qk().make_fragment_A(self.own_qk().partition_A(tiles))

    def k(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, columns, k, stages) of a CTA's (rows, dim, stages)."""
        return self.qk().make_fragment_B(self.own_qk().partition_B(tiles))

    def v(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, columns, k, stages) of a CTA's (rows, columns of V, stages)."""
        return self.pv().make_fragment_B(self.own_pv().partition_B(transposed(tiles)))

    def s(self, base: cute.Pointer, tile: int, turn: int | Int32) -> cute.Tensor:
        """S of a Q tile's block number `turn` as the product writes it."""
        layout = self.qk().make_fragment_C(self.qk().partition_shape_C(self.shape(self.plan.tile_n))).layout
        return cute.make_tensor(base + self.plan.s(tile, turn), layout)

    def o(self, base: cute.Pointer, tile: int) -> cute.Tensor:
        """O of a Q tile as the product writes it."""
        layout = self.pv().make_fragment_C(self.pv().partition_shape_C(self.shape(self.plan.dim_v))).layout
        return cute.make_tensor(base + self.plan.o(tile), layout)

    def p(self, base: cute.Pointer, tile: int, turn: int | Int32) -> cute.Tensor:
        """P of a Q tile's block as the product reads it: (mma, rows, k), 32 bits to a column."""
        layout = cute.make_layout((ROWS, self.plan.tile_n), stride=(self.plan.tile_n, 1))
        pointer = cute.recast_ptr(base + self.plan.p(tile, turn), dtype=self.p_dtype)
        p = self.own_pv().partition_A(cute.make_tensor(pointer, layout))
        # A fragment in tensor memory has a layout, but always begins at column 0.
        return cute.make_tensor(pointer, self.pv().make_fragment_A(p).layout)

    def shape(self, columns: int) -> tuple[int, int]:
        """Of a product's result."""
        return ROWS * self.group.ctas, columns


def tile_of(descriptors: cute.Tensor, index: int | Int32, turn: int | Int32) -> cute.Tensor:
    """Descriptors (mma, rows, k) of one of several tiles, computed anew in block number `turn`.

    Compilers would keep those of all k steps in registers from one block to the next, more than the mma warp
    has; so they are made to depend on the block, by a shift that gives 0, which is not told.
    """
    layout = cute.append(descriptors.layout, cute.make_layout(2, stride=1))
    zero = _found_here(turn) >> 31
    return cute.make_tensor(descriptors.iterator, layout)[None, None, None, index, zero]


def begin(
    mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate,
    steps: range | None = None,
    factors: Callable[[int], tuple[cute.Pointer, cute.Pointer]] | None = None,
) -> None:
    """Begin acc = a b, or acc += a b; a and b are (mma, rows, k). The whole warp calls this.

    steps: along k; None: all. factors: where, in tensor memory, a step's of a and of b are, of products that
    scale their operands.
    """
    for i, k in enumerate(steps or range(cute.size(b, mode=[2]))):
        mma.set(tcgen05.Field.ACCUMULATE, accumulate if i == 0 else True)
        if factors is not None:
            for field, place in zip((tcgen05.Field.SFA, tcgen05.Field.SFB), factors(k), strict=True):
                mma.set(field, place)
        cute.gemm(mma, acc, a[None, None, k], b[None, None, k], acc)


def _found_here(x: int | Int32) -> Int32:
    move = "mov.b32 $0, $1;"
    word = Int32(x).ir_value()
    return Int32(llvm.inline_asm(Int32.mlir_type, [word], move, "=r,r", has_side_effects=True))
