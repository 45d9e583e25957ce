"""The compute role for wide heads: each warpgroup has `keys` keys, dK and dV of them in registers.

    S = Q K^T and dP = dO V^T begun         wait S        P = exp(S - LSE)        P to shared
    dV^T += dO^T P begun      wait dP       dS = P (dP - D)    dS to shared, for all
    dQ = dS K begun           wait dV       dK^T += Q^T dS begun
    wait dQ                   dQ to shared, for the store role                    wait dK

Keys are columns of products, of which 8 are enough: so a warpgroup has as many as registers hold dK and dV
of. The 64 rows are a tile's of Q, or columns of dK and dV. P and dS lie in shared memory, transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...backward import scratch_columns
from ...common.key_block import KeyBlock
from ...common.operand import transposed
from ..mma import accumulator, begin_sum, coordinates, tiled_mma, to_shared, visible, wait
from .compute import Compute, Scores, as_a, as_b
from .config import ROWS, THREADS
from .elements import Straight, Visit
from .job import Edges, Sums, Tiles
from .store import Result

OWN = 4  # first of the named barriers of one compute warpgroup each


class Descriptors(NamedTuple):
    """Operands (mma, rows or columns, k, tiles) of a warpgroup's products.

    q, k: of S = Q K^T; grad_out, v: of dP = dO V^T; grad_out_as_a, p: of dV^T = dO^T P; q_as_a, ds: of
    dK^T = Q^T dS; slices: of dQ, for each slice of its columns all pairs (dS, K) that it is summed from.
    """

    q: cute.Tensor
    k: cute.Tensor
    grad_out: cute.Tensor
    v: cute.Tensor
    grad_out_as_a: cute.Tensor
    p: cute.Tensor
    q_as_a: cute.Tensor
    ds: cute.Tensor
    slices: tuple[list[tuple[cute.Tensor, cute.Tensor]], ...]


class WideResult(Result):
    """dK^T and dV^T, whose rows are columns of the gradients."""

    @cute.jit
    def add(self, block: KeyBlock, sums: Sums, visits: cutlass.Constexpr, row: Int32):
        """To the sums, from scratch row `row` on: of keys that exist, since tiles may be no whole scratch."""
        if visits.any():
            keys = block.sequence.k_rows + block.scratch_k(self.problem) - block.first_key - row
            for total, acc, dim in (
                (block.call.grad_k_sum, sums.k, self.problem.head_dim),
                (block.call.grad_v_sum, sums.v, self.problem.head_dim_v),
            ):
                place = total[block.kv_head, 0, None].iterator
                self.add_numbers(place, acc, scratch_columns(dim), row, keys)

    @cute.jit
    def add_numbers(
        self, place: cute.Pointer, acc: cute.Tensor, columns: cutlass.Constexpr, row: Int32, keys: Int32
    ):
        """acc (columns, keys) to rows from `row` on, of `columns` columns. keys: that exist."""
        at = coordinates(grad_kv(self.dtype, self.config.keys), self.config.keys)
        for n in cutlass.range_constexpr(self.config.keys // 4):
            key = at[0, n][1]
            for m in cutlass.range_constexpr(cute.size(acc, mode=[1]) * 2):
                column = m // 2 * ROWS + at[m % 2, 0][0]
                if (key < keys) & (column < columns):
                    number = acc[(n % 2, m % 2, n // 2), m // 2, 0]
                    target = place + number_of(row + key, column, columns)
                    cute.arch.red(target, number, op="add", dtype="f32", sem="relaxed", scope="gpu")

    def to_tile(self, acc: cute.Tensor, tile: cute.Tensor, columns: int) -> None:
        """An accumulator rounded into a shared tile."""
        rounded = cute.make_rmem_tensor(acc.layout, self.dtype)
        rounded.store(acc.load().to(self.dtype))
        used = cute.local_tile(tile, (self.config.keys, cute.size(acc, mode=[1]) * ROWS), (0, 0))
        thread = cute.arch.thread_idx()[0] % THREADS
        to_shared(grad_kv(self.dtype, self.config.keys), rounded, transposed(used), thread, transposed=True)


class WideCompute(Compute):
    """See the module. P leaves for shared memory at once: it is rounded on its own."""

    results = WideResult
    weights_are_p = False

    def gradients(self, visit: Visit, scores: Scores, sums: Sums, tiles: Tiles, edges: Edges) -> None:
        self.keep(visit, scores.p, tiles.p)
        self.begin_grad_kv(sums.v, visit.operands.grad_out_as_a, visit.operands.p, scores.out)
        wait(1, scores.dp)
        self.differentiate(visit, scores)
        self.share(visit, scores.ds, tiles.ds)
        acc_q = accumulator(self.config.slice_columns)
        self.begin_q(acc_q, visit, 0)
        wait(1, sums.v)
        scores.out.release()
        self.begin_grad_kv(sums.k, visit.operands.q_as_a, visit.operands.ds, scores.q)
        wait(1, acc_q)
        self.hand_over_slice(visit, acc_q, 0, tiles, edges)
        for part in range(1, self.slices):
            self.begin_q(acc_q, visit, part)
            wait(0, acc_q)
            self.hand_over_slice(visit, acc_q, part, tiles, edges)
        wait(0, sums.k)
        scores.q.release()

    def sums(self) -> Sums:
        return Sums(*map(self.grad_accumulator, (self.problem.head_dim, self.problem.head_dim_v)))

    def score_accumulator(self) -> cute.Tensor:
        return accumulator(self.config.keys)

    @property
    def slices(self) -> int:
        """Products that a warpgroup's part of dQ comes in."""
        return self.config.part_columns // self.config.slice_columns

    def descriptors(self, tiles: Tiles, warpgroup: Int32) -> Descriptors:
        config, moved = self.config, tiles.moved
        scores, grad_kv = self.scores(), self.grad_kv()

        def own(tile: cute.Tensor) -> cute.Tensor:
            """The warpgroup's keys of a tile (keys, columns, 1)."""
            return cute.local_tile(tile, (config.keys, cute.size(tile, mode=[1]), 1), (warpgroup, 0, 0))

        def gradient_rows(tile: cute.Tensor, dim: int) -> cute.Tensor:
            """The columns of Q or dO that are rows of a gradient."""
            rows = blocks(dim) * ROWS
            return cute.local_tile(transposed(tile), (rows, ROWS, cute.size(tile, mode=[2])), (0, 0, 0))

        return Descriptors(
            q=as_a(scores, moved.q),
            k=as_b(scores, own(moved.k)),
            grad_out=as_a(scores, moved.grad_out),
            v=as_b(scores, own(moved.v)),
            grad_out_as_a=as_a(grad_kv, gradient_rows(moved.grad_out, self.problem.head_dim_v)),
            p=as_b(grad_kv, own(tiles.p)),
            q_as_a=as_a(grad_kv, gradient_rows(moved.q, self.problem.head_dim)),
            ds=as_b(grad_kv, own(tiles.ds)),
            slices=tuple(self.slice_pairs(tiles, warpgroup, i) for i in range(self.slices)),
        )

    def slice_pairs(self, tiles: Tiles, warpgroup: Int32, i: int) -> list[tuple[cute.Tensor, cute.Tensor]]:
        """What slice i of the warpgroup's part of dQ is summed from."""
        return [self.slice_pair(tiles.ds, tiles.moved.k, warpgroup * self.slices + i)]

    def slice_pair(self, ds: cute.Tensor, k: cute.Tensor, index: Int32) -> tuple[cute.Tensor, cute.Tensor]:
        """dS and the columns of slice `index` of K, of one CTA's keys."""
        grad_q, columns = self.grad_q(), (self.config.slice_columns, self.config.cta_keys, 1)
        k = cute.local_tile(transposed(k), columns, (index, 0, 0))
        return as_a(grad_q, transposed(ds)), as_b(grad_q, k)

    def elements(self) -> Straight:
        """What happens to scores."""
        sparing = not self.config.overlap
        return Straight(self.problem, self.scores(), self.config.keys, self.weights_are_p, sparing)

    def scores(self) -> cute.TiledMma:
        """Of S and dP: 64 rows x keys."""
        return tiled_mma(self.dtype, self.config.keys, a_in_registers=False, b_transposed=False)

    def grad_kv(self) -> cute.TiledMma:
        return grad_kv(self.dtype, self.config.keys)

    def grad_q(self) -> cute.TiledMma:
        """Of a slice of dQ, 64 rows x its columns; dS lies with its rows contiguous."""
        columns = self.config.slice_columns
        return tiled_mma(self.dtype, columns, a_in_registers=False, b_transposed=True, a_transposed=True)

    def grad_accumulator(self, dim: int) -> cute.Tensor:
        """Registers of one thread for dK^T or dV^T: ((2, 2, keys / 8), blocks of 64 columns, 1)."""
        shape = (2, 2, self.config.keys // 8), blocks(dim), 1
        return cute.make_rmem_tensor(cute.make_layout(shape), Float32)

    def begin_s(self, s: cute.Tensor, visit: Visit, q) -> None:
        """S = Q K^T, of the tile in slot `q`; columns that are no more than padding are left out."""
        pair = visit.operands.q[None, None, None, q.index], visit.operands.k[None, None, None, 0]
        begin_sum(self.scores(), s, [pair], self.steps(self.problem.head_dim))

    def begin_dp(self, dp: cute.Tensor, visit: Visit, out) -> None:
        """dP = dO V^T, likewise."""
        pair = visit.operands.grad_out[None, None, None, out.index], visit.operands.v[None, None, None, 0]
        begin_sum(self.scores(), dp, [pair], self.steps(self.problem.head_dim_v))

    def begin_grad_kv(self, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, slot) -> None:
        """dV^T += dO^T P or dK^T += Q^T dS, of the tile in `slot`."""
        pair = a[None, None, None, slot.index], b[None, None, None, 0]
        begin_sum(self.grad_kv(), acc, [pair], self.steps(ROWS), accumulate=True)

    def begin_q(self, acc: cute.Tensor, visit: Visit, part: int) -> None:
        """A slice of the warpgroup's columns of dQ = dS K, over the keys of all warpgroups."""
        pairs = [tuple(side[None, None, None, 0] for side in pair) for pair in visit.operands.slices[part]]
        begin_sum(self.grad_q(), acc, pairs, self.steps(self.config.cta_keys))

    def keep(self, visit: Visit, p: cute.Tensor, tile: cute.Tensor) -> None:
        """P of this warpgroup's keys to shared memory, where all are done with the P and dS before."""
        self.all_meet()
        self.to_tile(visit, p, tile)
        cute.arch.barrier(barrier_id=OWN + visit.warpgroup, number_of_threads=THREADS)

    def share(self, visit: Visit, ds: cute.Tensor, tile: cute.Tensor) -> None:
        """dS of this warpgroup's keys to shared memory; behind it is that of all warpgroups."""
        self.to_tile(visit, ds, tile)
        self.all_meet()

    def to_tile(self, visit: Visit, scores: cute.Tensor, tile: cute.Tensor) -> None:
        """The warpgroup's part of a tile (keys, rows, 1)."""
        own = cute.local_tile(tile[None, None, 0], (self.config.keys, ROWS), (visit.warpgroup, 0))
        to_shared(self.scores(), scores, transposed(own), visit.thread, transposed=True)
        visible()

    def hand_over_slice(
        self, visit: Visit, acc_q: cute.Tensor, part: int, tiles: Tiles, edges: Edges
    ) -> None:
        """A slice of dQ to the store role."""
        self.hand_over(visit, acc_q, tiles.grad_q, edges.grad_q, visit.turn * self.slices + part)


def grad_kv(dtype: type, keys: int) -> cute.TiledMma:
    """Of 64 columns of dK and dV: 64 x keys; tiles of dO and Q are taken with their columns as rows."""
    return tiled_mma(dtype, keys, a_in_registers=False, b_transposed=False, a_transposed=True)


def blocks(dim: int) -> int:
    """Blocks of 64 columns that a head dim takes."""
    return -(-dim // ROWS)


def number_of(row: Int32, column: Int32, columns: int) -> Int32:
    """Where sums of `columns` columns have an element: see `common.sums`, 64 rows and 128 threads."""
    r = row % ROWS
    thread = r // 16 * 32 + r % 8 * 4 + column % 8 // 2
    number = column // 8 * 4 + r % 16 // 8 * 2 + column % 2
    return row // ROWS * (ROWS * columns) + number * THREADS + thread
