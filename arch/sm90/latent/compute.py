"""The compute role: two warpgroups with the same rows take blocks of K in turn, and share out V's columns.

    own block n      begin S = Q K[n], part by part
    the other's      wait P and max   rescale O   begin O += P V[n-1]
    own block n      wait S   max(S)   exp(S)   wait O   hand over P = S   rescale O   O += P V[n]

So one's scores are multiplied while the other has its softmax. P and the maximum go back and forth in one
place of shared memory: who reads it writes it next, so that one barrier for each hand-over is enough. Each
sums up the rows of its own blocks; in the end the two sums are added.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import warpgroup as wgmma

from ...common.job import Job, Launch, visits_of
from ...common.memory import Tiles, in_place
from ...common.operand import Operand
from ...common.order import compute_before_wait
from ...common.softmax import OnlineSoftmax, exp2, finite
from ...problem import Problem
from ..config import Config
from ..edge import warp_arrives
from ..forward.compute import Change, Compute, Share
from ..forward.job import job_of
from ..forward.rows import columns_of
from ..mma import ROWS, begin, coordinates, operand_a, tiled_mma, to_shared, visible, wait
from .config import PART
from .load import Edges
from .parts import NOT_V, RANGES, Parts

# The first of the named barriers: one for each who takes P, one for each alone; and the one of both.
HANDED, ALONE, BOTH = 1, 5, 3


class HandOver(NamedTuple):
    """What goes from the one warpgroup to the other: P (rows, keys), and (rows,) maxima.

    sums: (2, thread, warpgroup), in the place of P when that has been read.
    """

    p: cute.Tensor
    row_max: cute.Tensor
    sums: cute.Tensor


class LatentTiles(NamedTuple):
    """tiles: v is k."""

    tiles: Tiles
    handed: HandOver


class State(NamedTuple):
    """As for other heads; descriptors of q and k for each range of parts, from its first on.

    p_handed: descriptors of P in shared memory (mma, rows, k).
    """

    q: tuple[cute.Tensor, ...]
    k: tuple[cute.Tensor, ...]
    v: cute.Tensor
    s: cute.Tensor
    p: cute.Tensor
    o: cute.Tensor
    softmax: OnlineSoftmax
    shares: tuple[Share, ...]
    p_handed: cute.Tensor


class LatentCompute(Compute):
    """Tiles of K, whole, and their first columns, as V, are both made of the same swizzled parts."""

    def __init__(self, problem: Problem, config: Config, out: Operand):
        super().__init__(problem, config, out)
        tiles = problem.precision, config.tile_n
        self.whole = Operand.of(*tiles, problem.head_dim, config.stages, False)
        self.half = Operand.of(*tiles, self.dim_v, config.stages, False, self.whole.pitch)
        self.k_parts = Parts.of(problem)

    @cute.jit
    def run(self, launch: Launch, every: LatentTiles, edges: Edges, warpgroup: Int32):
        job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
        if job.first_row < job.sequence.q_rows:
            tiles, handed = every.tiles, every.handed
            p = self.pv_handed().get_slice(0).partition_A(handed.p)
            seen = tiles._replace(k=in_place(tiles.k, self.whole))
            state = State(*self.state(job, seen, warpgroup), self.pv_handed().make_fragment_A(p))
            state = state._replace(**self.in_ranges(seen, warpgroup))
            self.blocks(job, state, handed, edges, warpgroup)
            self.add_sums(state, handed, warpgroup)
            self.store.tile(job, tiles, state, warpgroup)
        self.store.finish()

    @cute.jit
    def blocks(self, job: Job, state: State, handed: HandOver, edges: Edges, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.shares[0].rules)
        if visits.any():
            cute.arch.mbarrier_wait(edges.q, 0)
            if warpgroup == 0:
                self.begin_own(state, edges, Int32(0), warpgroup)
                wait(0, state.s)
                self.free_rest(edges, Int32(0))
                first = visits.block(visits.start)
                change = self.raise_max(job, state, first, True, warpgroup)
                self.exponentiate(state, change)
                self.to_p(job, state, first, warpgroup)
                self.give(state, handed, warpgroup)
                self.finish_own(state, edges, Int32(0), change, warpgroup)
            for i in cutlass.range(2 - warpgroup, visits.total, 2, unroll=1):
                self.begin_own(state, edges, i, warpgroup)
                self.take(state, handed, i - 1, warpgroup)
                wait(1, state.s)
                self.free_rest(edges, i)
                n = visits.block(visits.after(visits.start, i))
                change = self.raise_max(job, state, n, True, warpgroup)
                half = cute.size(state.s) // 4  # of a row's columns
                self.exponentiate(state, change, range(half))
                compute_before_wait(state.softmax.row_sum[0], state.softmax.row_sum[1])
                wait(0, state.o)
                self.free(edges, i - 1, 1 + warpgroup)
                self.exponentiate(state, change, range(half, 2 * half))
                self.to_p(job, state, n, warpgroup)
                # A warp that has waited for its products does not know that the others' are done with P.
                cute.arch.barrier(barrier_id=ALONE + warpgroup, number_of_threads=128)
                self.give(state, handed, warpgroup)
                self.finish_own(state, edges, i, change, warpgroup)
            last = visits.total - 1
            if last % 2 != warpgroup:
                self.take(state, handed, last, warpgroup)
                wait(0, state.o)

    def in_ranges(self, tiles: Tiles, warpgroup: Int32) -> dict[str, tuple[cute.Tensor, ...]]:
        """Descriptors of q and k."""
        mma, qs, ks = self.qk().get_slice(0), [], []
        for _, first, _ in self.k_parts.ranges(warpgroup):
            q, k = (
                cute.make_tensor(tile.iterator + first * rows * PART, tile.layout)
                for tile, rows in ((tiles.q[None, None, 0], ROWS), (tiles.k, self.config.tile_n))
            )
            qs.append(self.qk().make_fragment_A(mma.partition_A(q)))
            ks.append(self.qk().make_fragment_B(mma.partition_B(k)))
        return {"q": tuple(qs), "k": tuple(ks)}

    def begin_own(self, state: State, edges: Edges, i: Int32, warpgroup: Int32) -> None:
        """Begin S = Q K of visit i, which is this warpgroup's, part by part as they arrive."""
        mma, begun = self.qk(), False
        wgmma.fence()
        for (_, first, count), q, k in zip(self.k_parts.ranges(warpgroup), state.q, state.k, strict=True):
            k = k[None, None, None, self.slot(i)]
            steps = cute.size(k, mode=[2]) // self.k_parts.count
            for n in range(count):
                full = edges.k + self.slot(i) * self.k_parts.count + first + n
                cute.arch.mbarrier_wait(full, (i // self.config.stages) & 1)
                for step in range(n * steps, (n + 1) * steps):
                    mma.set(wgmma.Field.ACCUMULATE, begun)
                    cute.gemm(mma, state.s, q[None, None, step], k[None, None, step], state.s)
                    begun = True
        wgmma.commit_group()

    def finish_own(self, state: State, edges: Edges, i: Int32, change: Change, warpgroup: Int32) -> None:
        """O += P V of visit i, with P in registers."""
        self.rescale(state.o, change.rescale)
        v = state.v[None, None, None, self.slot(i)]
        begin(self.pv(), state.o, operand_a(state.p), v, accumulate=True)
        wait(0, state.o)
        self.free(edges, i, 1 + warpgroup)

    def give(self, state: State, handed: HandOver, warpgroup: Int32) -> None:
        """P and the maximum, to the other warpgroup."""
        to_shared(self.qk(), state.p, handed.p, cute.arch.thread_idx()[0] % 128)
        self.write_max(state.softmax, handed)
        visible()
        cute.arch.barrier_arrive(barrier_id=HANDED + 1 - warpgroup, number_of_threads=256)

    @cute.jit
    def write_max(self, softmax: OnlineSoftmax, handed: HandOver):
        at = coordinates(self.qk(), self.config.tile_n)
        if cute.arch.thread_idx()[0] % 4 == 0:
            for r in cutlass.range_constexpr(cute.size(softmax.row_max)):
                handed.row_max[at[r, 0][0]] = softmax.row_max[r]

    def take(self, state: State, handed: HandOver, i: Int32, warpgroup: Int32) -> None:
        """Begin O += P V of visit i, whose P and maximum the other warpgroup has handed over; it has waited
        for K.
        """
        at, softmax = coordinates(self.qk(), self.config.tile_n), state.softmax
        factors = cute.make_rmem_tensor_like(softmax.row_max)
        cute.arch.barrier(barrier_id=HANDED + warpgroup, number_of_threads=256)
        for r in range(cute.size(factors)):
            raised = handed.row_max[at[r, 0][0]]
            factors[r] = exp2((softmax.row_max[r] - finite(raised)) * softmax.scale_log2)
            softmax.row_max[r] = raised
            softmax.row_sum[r] = softmax.row_sum[r] * factors[r]
        self.rescale(state.o, factors)
        v = state.v[None, None, None, self.slot(i)]
        begin(self.pv_handed(), state.o, state.p_handed, v, accumulate=True)

    def free_rest(self, edges: Edges, i: Int32) -> None:
        """Let what is not V of visit i be replaced."""
        if self.k_parts.rest:
            self.free(edges, i, NOT_V)

    def free(self, edges: Edges, i: Int32, number: Int32 | int) -> None:
        """Let a range of K's parts of visit i be replaced: this warp has read them."""
        warp_arrives(edges.freed + self.slot(i) * RANGES + number)

    def slot(self, i: Int32) -> Int32:
        """Where K of visit i lies."""
        return i % self.config.stages

    @cute.jit
    def add_sums(self, state: State, handed: HandOver, warpgroup: Int32):
        """Row sums of all blocks, when both are done with P, and with Q."""
        thread, row_sum = cute.arch.thread_idx()[0] % 128, state.softmax.row_sum
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=256)
        for r in cutlass.range_constexpr(cute.size(row_sum)):
            handed.sums[r, thread, warpgroup] = row_sum[r]
        cute.arch.barrier(barrier_id=BOTH, number_of_threads=256)
        for r in cutlass.range_constexpr(cute.size(row_sum)):
            row_sum[r] = row_sum[r] + handed.sums[r, thread, 1 - warpgroup]

    def pv_handed(self) -> cute.TiledMma:
        """O += P V with P in shared memory."""
        return tiled_mma(self.dtype, self.dim_v, a_in_registers=False, b_transposed=True)

    def v(self, tiles: Tiles, warpgroup: Int32) -> cute.Tensor:
        """(rows, columns, stages): a warpgroup's part of V's columns, which lie behind each other."""
        half = in_place(tiles.k, self.half)
        before = columns_of(self.config, warpgroup) * self.half.rows * self.dim_v
        return cute.make_tensor(half.iterator + before, half.layout)
