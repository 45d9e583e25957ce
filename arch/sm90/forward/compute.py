"""The compute role: each warpgroup takes 64 rows of Q, and all the blocks of K and V.

    overlap:    S = Q K[n-1] begun   O += P V[n] begun   wait S   softmax(S)   wait O   rescale O   P = S
    otherwise:  S = Q K[n]   wait S   softmax(S)   rescale O   P = S   O += P V[n]   wait O

In turn (`ping_pong`), warpgroups begin their products: while one computes exponentials, the tensor cores
work for another. P never leaves registers: 16-bit A operands lie as accumulators do.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline
from cutlass.cute.nvgpu import warp

from ...common.dropout import Dropout
from ...common.fragment import rows_by_columns
from ...common.operand import Operand, padded, transposed
from ...common.output import OutputRows
from ...common.rules import Rules
from ...common.softmax import LOG2_E, OnlineSoftmax
from ...elementwise import where
from ...problem import Problem
from ..mma import ROWS, accumulator, begin, hold, operand_a, pin, tiled_mma, wait
from ..tuning import Config
from .job import Job, Tiles, visits_of

ROW_LANES = (1, 2)  # wgmma gives a row of the accumulator to 4 neighbouring lanes
TURN, STORE = 1, 4  # first of the named barriers, one per warpgroup


class ComputeEnds(NamedTuple):
    q: pipeline.PipelineConsumer
    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer


class State(NamedTuple):
    """One thread's share: descriptors q (mma, rows, k), k and v (mma, columns, k, stages); registers.

    s, p, o: as accumulators.
    """

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    s: cute.Tensor
    p: cute.Tensor
    o: cute.Tensor
    softmax: OnlineSoftmax
    rules: Rules
    dropout: Dropout | None


class Compute:
    """out: the operand that it stores."""

    def __init__(self, problem: Problem, config: Config, out: Operand):
        self.problem, self.config, self.out = problem, config, out
        self.dtype, self.dim_v = out.dtype, padded(out.dim)

    @cute.jit
    def run(self, job: Job, tiles: Tiles, ends: ComputeEnds, warpgroup: Int32):
        state = self.state(job, tiles, warpgroup)
        self.first_turn(warpgroup)
        if cutlass.const_expr(self.config.overlap):
            self.overlapped(job, state, ends, warpgroup)
        else:
            self.in_order(job, state, ends, warpgroup)
        self.last_turn(warpgroup)
        self.store(job, tiles, state, warpgroup)

    @cute.jit
    def overlapped(self, job: Job, state: State, ends: ComputeEnds, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.rules)
        if visits.any():
            ends.q.wait_and_advance()
            k = ends.k.wait_and_advance()
            self.begin_s(state, k)
            wait(0, state.s)
            k.release()
            self.softmax(state, self.first_row(job, warpgroup), visits.block(visits.start), True)
            self.to_p(state)
            rest = visits.rest()
            # Without a mask only the first block visited is partly hidden, and that is done.
            phases = rest.phases if self.problem.mask else rest.phases[1:]
            for p in cutlass.range_constexpr(len(phases)):
                masked = phases[p].masked
                for i in cutlass.range(phases[p].visits, unroll=1):
                    n = rest.block(rest.nth(phases[p], i))
                    k = ends.k.wait_and_advance()
                    self.await_turn(warpgroup)
                    self.begin_s(state, k)
                    v = ends.v.wait_and_advance()
                    self.begin_o(state, v)
                    self.end_turn(warpgroup)
                    wait(1, state.s)
                    k.release()
                    rescale = self.softmax(state, self.first_row(job, warpgroup), n, masked)
                    hold(state.softmax.row_sum[0] + state.softmax.row_sum[1])
                    wait(0, state.o)
                    v.release()
                    self.rescale(state.o, rescale)
                    self.to_p(state)
            v = ends.v.wait_and_advance()
            self.begin_o(state, v)
            wait(0, state.o)

    @cute.jit
    def in_order(self, job: Job, state: State, ends: ComputeEnds, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.rules)
        if visits.any():
            ends.q.wait_and_advance()
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            masked = phases[p].masked
            for i in cutlass.range(phases[p].visits, unroll=1):
                n = visits.block(visits.nth(phases[p], i))
                k = ends.k.wait_and_advance()
                self.await_turn(warpgroup)
                self.begin_s(state, k)
                self.end_turn(warpgroup)
                wait(0, state.s)
                k.release()
                rescale = self.softmax(state, self.first_row(job, warpgroup), n, masked)
                self.rescale(state.o, rescale)
                self.to_p(state)
                v = ends.v.wait_and_advance()
                self.begin_o(state, v)
                wait(0, state.o)
                v.release()

    def state(self, job: Job, tiles: Tiles, warpgroup: Int32) -> State:
        call, columns = job.call, self.config.tile_n
        qk, pv = self.qk().get_slice(0), self.pv().get_slice(0)
        s, o = accumulator(columns), accumulator(self.dim_v)
        o.fill(0.0)
        p = cute.make_rmem_tensor(s.layout, self.dtype)
        rows = cute.size(rows_by_columns(s), mode=[0])
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        scale = 1.0 if self.problem.score else call.softmax_scale
        dropout = None
        if self.problem.dropout:
            place = job.sequence.batch * call.q.shape[-2] + job.head
            dropout = Dropout.of(call.rng_state, place, call.keep_threshold)
        return State(
            q=self.qk().make_fragment_A(qk.partition_A(tiles.q[None, None, warpgroup])),
            k=self.qk().make_fragment_B(qk.partition_B(tiles.k)),
            v=self.pv().make_fragment_B(pv.partition_B(transposed(tiles.v))),
            s=s,
            p=p,
            o=o,
            softmax=OnlineSoftmax.create(rows, Float32(scale * LOG2_E), ROW_LANES),
            rules=Rules.of(self.problem, call, job.sequence, job.head),
            dropout=dropout,
        )

    def qk(self) -> cute.TiledMma:
        return tiled_mma(self.dtype, self.config.tile_n, a_in_registers=False, b_transposed=False)

    def pv(self) -> cute.TiledMma:
        return tiled_mma(self.dtype, self.dim_v, a_in_registers=True, b_transposed=True)

    def begin_s(self, state: State, k) -> None:
        """S = Q K, of the K tile in slot `k`."""
        begin(self.qk(), state.s, state.q, state.k[None, None, None, k.index], accumulate=False)

    def begin_o(self, state: State, v) -> None:
        """O += P V, of the V tile in slot `v`."""
        begin(self.pv(), state.o, operand_a(state.p), state.v[None, None, None, v.index], accumulate=True)

    def softmax(self, state: State, first_row: Int32, n: Int32, masked: bool) -> cute.Tensor:
        """Scores of rows `first_row` and on in KV block n become P; what O must be multiplied by for it."""
        s, at = rows_by_columns(state.s), self.coordinates(self.qk(), self.config.tile_n)
        first_key = n * self.config.tile_n

        def row_of(r: int) -> Int32:
            return first_row + at[r, 0][0]

        state.rules.apply(s, row_of, lambda c: first_key + at[0, c][1], masked)
        rescale = state.softmax.raise_max(s)
        state.softmax.exponentials(s, rescale)
        if state.dropout is not None:
            state.dropout.apply(s, row_of, first_key, cute.arch.thread_idx()[0])
        return rescale

    def to_p(self, state: State) -> None:
        """P as the next product's operand: half the registers, from here on."""
        state.p.store(state.s.load().to(self.dtype))
        pin(state.p)

    @cute.jit
    def rescale(self, acc_o: cute.Tensor, factors: cute.Tensor):
        """O *= factors, row by row, unless no row of the warp has a new maximum."""
        if cute.arch.vote_any_sync((factors[0] != 1.0) | (factors[1] != 1.0)):
            o = rows_by_columns(acc_o)
            for r in cutlass.range_constexpr(cute.size(o, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(o, mode=[1])):
                    o[r, c] = o[r, c] * factors[r]

    def first_row(self, job: Job, warpgroup: Int32) -> Int32:
        """The first of a warpgroup's rows, in the sequence."""
        return job.first_row + warpgroup * ROWS

    def coordinates(self, mma: cute.TiledMma, columns: int) -> cute.Tensor:
        """(row, column) among the warpgroup's of each of a thread's elements: rows x columns."""
        thread = cute.arch.thread_idx()[0] % 128
        return rows_by_columns(mma.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, columns))))

    @cute.jit
    def first_turn(self, warpgroup: Int32):
        """The last warpgroup lets the first one begin."""
        if warpgroup == self.config.consumers - 1:
            self.end_turn(warpgroup)

    @cute.jit
    def last_turn(self, warpgroup: Int32):
        """The first warpgroup takes the turn that it was left, so that every arrival has met its wait."""
        if warpgroup == 0:
            self.await_turn(warpgroup)

    def await_turn(self, warpgroup: Int32) -> None:
        if self.config.ping_pong:
            cute.arch.barrier(barrier_id=TURN + warpgroup, number_of_threads=256)

    def end_turn(self, warpgroup: Int32) -> None:
        if self.config.ping_pong:
            after = where(warpgroup == self.config.consumers - 1, 0, warpgroup + 1)
            cute.arch.barrier_arrive(barrier_id=TURN + after, number_of_threads=256)

    @cute.jit
    def store(self, job: Job, tiles: Tiles, state: State, warpgroup: Int32):
        """O / row_sum, by way of the warpgroup's own part of Q's tiles, and the log-sum-exp."""
        thread, first_row = cute.arch.thread_idx()[0] % 128, self.first_row(job, warpgroup)
        o, at = rows_by_columns(state.o), self.coordinates(self.pv(), self.dim_v)
        self.output_rows(job).finish(o, state.softmax, lambda r: first_row + at[r, 0][0], thread % 4 == 0)
        tile = tiles.out[None, None, warpgroup]
        out = cute.make_rmem_tensor(state.o.layout, self.dtype)
        out.store(state.o.load().to(self.dtype))
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, self.pv()).get_slice(thread)
        cute.copy(copy, copy.retile(out), copy.partition_D(tile))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=STORE + warpgroup, number_of_threads=128)
        if cute.arch.make_warp_uniform(thread // 32) == 0:
            self.store_tile(job, tile, first_row)

    def output_rows(self, job: Job) -> OutputRows:
        problem, call, sequence = self.problem, job.call, job.sequence
        return OutputRows(
            used=sequence.seqlen_q if problem.seqused_q else None,
            end=sequence.q_rows,
            lse=sequence.lse_of(call.lse, job.head) if problem.lse else None,
            sink=call.sink[job.head] if problem.sink else None,
            factor=call.keep_scale if problem.dropout else None,
        )

    def store_tile(self, job: Job, tile: cute.Tensor, first_row: Int32) -> None:
        """One warp copies a tile to the rows from `first_row`."""
        s = job.sequence
        rows = self.out.head_rows(job.maps.out, s.batch, job.head, s.q_start, s.q_start + s.q_rows)
        target, source = self.out.sides(rows, first_row, tile)
        cute.copy(rows.atom, source, target)
        cute.arch.cp_async_bulk_commit_group()
        # Shared memory must outlive the copy's reading of it.
        cute.arch.cp_async_bulk_wait_group(0, read=True)
