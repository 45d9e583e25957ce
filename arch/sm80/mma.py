"""Products of tiles with mma.sync, operands brought from shared memory by ldmatrix.

ldmatrix.x4 brings a piece of 16 x 16, 8 x 8 from each quarter of the lanes: every lane names 16 bytes.
In the tiles of `copy.tile_layout` that takes one address per thread and tile: a piece further down lies
a constant further, one to the right has constant address bits flipped, because the swizzle is an XOR
with row % 8, which is the lane's own in every piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import AddressSpace, Float32, Int32
from cutlass.cute.nvgpu import warp

from .copy import CHUNK, tile_width

PIECE = 16  # rows and columns that one ldmatrix.x4 brings; also mma's k


def tiled_mma(dtype: type, warps: int, abreast: int = 1) -> cute.TiledMma:
    """m16n8k16, the warps below each other along the rows; of `abreast` times as many, those with the same
    rows have pieces of 16 columns in turn.
    """
    op = warp.MmaF16BF16Op(dtype, Float32, (16, 8, PIECE))
    columns = 16 if abreast == 1 else cute.make_layout((8, abreast, 2), stride=(1, 16, 8))
    return cute.make_tiled_mma(op, (warps, abreast, 1), permutation_mnk=(16 * warps, columns, PIECE))


class Pieces(NamedTuple):
    """A thread's view of shared tiles (rows, dim, stages) as pieces of 16 x 16.

    address: of the 16 bytes that it names for piece (0, 0) of the first tile. transposed: k runs along
    the rows. apart: from one of the thread's pieces of B to the next, in pieces. shift: bytes to be added.
    """

    dtype: type
    rows: int
    dim: int
    transposed: bool
    address: Int32
    apart: int = 1
    shift: Int32 | int = 0

    @staticmethod
    def a(tile: cute.Tensor, thread: Int32) -> Pieces:
        """The A operand, k along the columns; each warp has its own 16 rows of every 16 * warps."""
        return Pieces.of(tile, thread // 32 * PIECE + thread % 16, thread // 16 % 2, False)

    @staticmethod
    def b(tile: cute.Tensor, thread: Int32) -> Pieces:
        """The B operand with its columns as rows and k along the columns."""
        return Pieces.of(tile, thread // 16 % 2 * 8 + thread % 8, thread // 8 % 2, False)

    @staticmethod
    def b_transposed(tile: cute.Tensor, thread: Int32, first: Int32 | int = 0, apart: int = 1) -> Pieces:
        """The B operand as it is: k along the rows. The thread's pieces: from the first on, `apart`, a power
        of two that is more than `first`.
        """
        chunk = thread // 16 % 2 if isinstance(first, int) and not first else first * 2 + thread // 16 % 2
        return Pieces.of(tile, thread % 16, chunk, True, apart)

    @staticmethod
    def of(tile: cute.Tensor, row: Int32, chunk: Int32, transposed: bool, apart: int = 1) -> Pieces:
        """The pieces whose first has the thread's 16 bytes at `row` and `chunk`."""
        rows, dim = cute.size(tile, mode=[0]), cute.size(tile, mode=[1])
        mine = cute.local_tile(tile[row, None, 0], (CHUNK,), (chunk,))
        return Pieces(tile.element_type, rows, dim, transposed, mine.iterator.toint().to(Int32), apart)

    def at(self, slot: Int32) -> Pieces:
        """The same of the tile in `slot`."""
        return self._replace(address=self.address + slot * (self.rows * self.dim * self.dtype.width // 8))

    def shifted(self, size: Int32) -> Pieces:
        """The same of a tile of the same shape, `size` bytes further."""
        return self._replace(shift=self.shift + size)

    def operand_a(self, k: int, registers: cute.Tensor, warps: int) -> cute.Tensor:
        """Fill A's registers (mma, M) for k step `k`; the thread's row blocks are `warps` apart."""
        for m in range(cute.size(registers, mode=[1])):
            self._load(m * warps, k, registers[None, m])
        return registers

    def operand_b(self, n: int, k: int) -> cute.Tensor:
        """B's registers (mma, 2) for columns 16 n and on, k step `k`."""
        registers = cute.make_rmem_tensor(((2, 2), 2), self.dtype)
        self._load(n * self.apart, k, registers)
        return registers

    def _load(self, i: int, k: int, registers: cute.Tensor) -> None:
        """The piece at row (of A) or column (of B) 16 i and k 16 k."""
        down, right = (k, i) if self.transposed else (i, k)
        width, size = tile_width(self.dim), self.dtype.width // 8
        block, inside = divmod(PIECE * right, width)
        address = self.address ^ (inside * size)
        address = address + (block * self.rows + PIECE * down) * width * size + self.shift
        source = cute.make_ptr(self.dtype, address, AddressSpace.smem, assumed_align=16)
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(self.transposed, 4), self.dtype)
        flat = cute.make_layout(((CHUNK, 1),))
        cute.copy(ldmatrix, cute.make_tensor(source, flat), cute.make_tensor(registers.iterator, flat))


def product(mma: cute.TiledMma, acc: cute.Tensor, steps: int, load_a: Callable, b: Pieces) -> None:
    """acc (mma, M, N) += A B over `steps` steps of k; load_a(k) -> A's registers (mma, M).

    B's pieces come from b.operand_b(n, k), one ahead of their use.
    """
    columns = cute.logical_divide(acc, (None, None, 2))  # (mma, M, (2, N / 2)): a piece feeds two n8 steps
    order = [(n, k) for k in range(steps) for n in range(cute.size(acc, mode=[2]) // 2)]
    ahead = b.operand_b(*order[0])
    for i, (n, k) in enumerate(order):
        piece = ahead
        if i + 1 < len(order):
            ahead = b.operand_b(*order[i + 1])
        if n == 0:
            a = load_a(k)
        c = columns[None, None, (None, n)]
        cute.gemm(mma, c, a, piece, c)


def rounded(acc: cute.Tensor, dtype: type) -> cute.Tensor:
    """An accumulator in the operands' type."""
    narrow = cute.make_rmem_tensor(acc.shape, dtype)
    narrow.store(acc.load().to(dtype))
    return narrow
