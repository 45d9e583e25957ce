"""The compute role: each warpgroup takes 64 rows of Q, and all the blocks of K and V.

    overlap:    S = Q K[n-1] begun   O += P V[n] begun   wait S   max(S)   half of exp(S)
                wait O   rescale O   the rest of exp(S)   P = S
    otherwise:  S = Q K[n]   wait S   max(S)   rescale O   exp(S)   P = S   O += P V[n]   wait O

O is rescaled before the last exponentials, not after: that is a branch, and P = S, which is to fill the
gaps between exponentials, cannot pass it. By then half of them have run beside the product.

In turn (`ping_pong`), warpgroups begin their products: while one computes exponentials, the tensor cores
work for another. P never leaves registers: 16-bit A operands lie as accumulators do.

With several heads in a tile a thread's two rows may be of two heads: each head has rules of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common.columns import Keys
from ...common.dropout import Dropout
from ...common.element import element_type
from ...common.fragment import rows_by_columns, some_rows
from ...common.job import Job, Launch, visits_of
from ...common.memory import Tiles
from ...common.operand import Operand, transposed
from ...common.order import compute_before_wait, pin
from ...common.rules import Rules
from ...common.softmax import LOG2_E, OnlineSoftmax, is_large
from ...elementwise import where
from ...problem import Problem
from ..config import Config
from ..mma import accumulator, begin, coordinates, operand_a, tiled_mma, wait
from .job import job_of
from .rows import ROW_LANES, heads_of_thread, row_of, rows_of
from .store import Partial, Result

TURN = 1  # first of the named barriers, one per warpgroup


class ComputeEnds(NamedTuple):
    q: pipeline.PipelineConsumer
    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer


class Share(NamedTuple):
    """Those of a thread's rows that belong to one head."""

    head: Int32
    rules: Rules
    dropout: Dropout | None


class Change(NamedTuple):
    """What a block's scores do to a thread's rows, (rows,) each: factors for what was accumulated before, and
    what is to be taken off exponents of two.
    """

    rescale: cute.Tensor
    shifts: cute.Tensor


class State(NamedTuple):
    """One thread's part: descriptors q (mma, rows, k), k and v (mma, columns, k, stages); registers.

    s, p, o: as accumulators. shares: of its rows, in order and of equal size.
    """

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    s: cute.Tensor
    p: cute.Tensor
    o: cute.Tensor
    softmax: OnlineSoftmax
    shares: tuple[Share, ...]


class Compute:
    """out: the operand that leaves by TMA, where the problem is not split."""

    def __init__(self, problem: Problem, config: Config, out: Operand):
        self.problem, self.config = problem, config
        self.dtype = element_type(problem.precision)
        self.dim_v = problem.precision.padded(problem.head_dim_v) // config.abreast
        chosen = (problem, config, self.pv)
        self.store = Partial(*chosen) if problem.split_kv else Result(*chosen, out)

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, ends: ComputeEnds, warpgroup: Int32):
        self.first_turn(warpgroup)
        block = cute.arch.block_idx()[0]
        if cutlass.const_expr(self.config.persistent):
            for i in cutlass.range(block, launch.schedule.count, cute.arch.grid_dim()[0], unroll=1):
                job = job_of(self.problem, self.config, launch, i)
                ends = self.tile(job, tiles, ends, warpgroup)
        else:
            ends = self.tile(job_of(self.problem, self.config, launch, block), tiles, ends, warpgroup)
        self.store.finish()
        self.last_turn(warpgroup)

    @cute.jit
    def tile(self, job: Job, tiles: Tiles, ends: ComputeEnds, warpgroup: Int32):
        if job.first_row < job.sequence.q_rows:
            state = self.state(job, tiles, warpgroup)
            if cutlass.const_expr(self.config.overlap):
                ends = self.overlapped(job, state, ends, warpgroup)
            else:
                ends = self.in_order(job, state, ends, warpgroup)
            self.store.tile(job, tiles, state, warpgroup)
        return ends

    @cute.jit
    def overlapped(self, job: Job, state: State, ends: ComputeEnds, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.shares[0].rules)
        if visits.any():
            q = ends.q.wait_and_advance()
            k = ends.k.wait_and_advance()
            self.begin_s(state, k)
            wait(0, state.s)
            k.release()
            first = visits.block(visits.start)
            change = self.raise_max(job, state, first, True, warpgroup)
            self.exponentiate(state, change)
            self.to_p(job, state, first, warpgroup)
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
                    change = self.raise_max(job, state, n, masked, warpgroup)
                    half = cute.size(state.s) // 4  # of a row's columns
                    self.exponentiate(state, change, range(half))
                    compute_before_wait(state.softmax.row_sum[0], state.softmax.row_sum[1])
                    wait(0, state.o)
                    v.release()
                    self.rescale(state.o, change.rescale)
                    self.exponentiate(state, change, range(half, 2 * half))
                    self.to_p(job, state, n, warpgroup)
            self.release_last(q)
            v = ends.v.wait_and_advance()
            self.begin_o(state, v)
            wait(0, state.o)
            self.release_last(v)
        return ends

    @cute.jit
    def in_order(self, job: Job, state: State, ends: ComputeEnds, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.shares[0].rules)
        if visits.any():
            q = ends.q.wait_and_advance()
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
                    change = self.raise_max(job, state, n, masked, warpgroup)
                    self.rescale(state.o, change.rescale)
                    self.exponentiate(state, change)
                    self.to_p(job, state, n, warpgroup)
                    v = ends.v.wait_and_advance()
                    self.begin_o(state, v)
                    wait(0, state.o)
                    v.release()
            self.release_last(q)
        return ends

    def release_last(self, slot) -> None:
        """Let a tile be filled again after its last use, if there is anything to fill it with."""
        if self.config.persistent:
            slot.release()

    def state(self, job: Job, tiles: Tiles, warpgroup: Int32) -> State:
        call, columns = job.call, self.config.tile_n
        qk, pv = self.qk().get_slice(0), self.pv().get_slice(0)
        s, o = accumulator(columns), accumulator(self.dim_v)
        o.fill(0.0)
        p = cute.make_rmem_tensor(s.layout, self.dtype)
        rows = cute.size(rows_by_columns(s), mode=[0])
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        scale = 1.0 if self.problem.score else call.softmax_scale
        return State(
            q=self.qk().make_fragment_A(qk.partition_A(tiles.q[None, None, rows_of(self.config, warpgroup)])),
            k=self.qk().make_fragment_B(qk.partition_B(tiles.k)),
            v=self.pv().make_fragment_B(pv.partition_B(transposed(self.v(tiles, warpgroup)))),
            s=s,
            p=p,
            o=o,
            softmax=OnlineSoftmax.create(rows, Float32(scale * LOG2_E), ROW_LANES),
            shares=tuple(self.share(job, head) for head in heads_of_thread(self.config, job, warpgroup)),
        )

    def v(self, tiles: Tiles, warpgroup: Int32) -> cute.Tensor:
        """(rows, columns, stages) of V that a warpgroup multiplies with."""
        return tiles.v

    def share(self, job: Job, head: Int32) -> Share:
        of = self.problem, job.call, job.sequence, job.heads.known(self.config.heads, head)
        return Share(head, Rules.of(*of), Dropout.of(*of))

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

    def raise_max(self, job: Job, state: State, n: Int32, masked: bool, warpgroup: Int32) -> Change:
        """The scores of KV block n, by the rules, join the maximum."""
        s, at = rows_by_columns(state.s), coordinates(self.qk(), self.config.tile_n)
        first_key = n * self.config.tile_n
        for share, rows, row in self.parts(job, state, s, at, warpgroup):
            share.rules.apply(rows, row, Keys(first_key + at[0, 0][1], in_pairs=True), masked)
        change = Change(state.softmax.raise_max(s), state.softmax.shifts())
        self.lower(state.softmax, s, change.shifts)
        return change

    def parts(self, job: Job, state: State, s: cute.Tensor, at: cute.Tensor, warpgroup: Int32) -> list[tuple]:
        """Per share: it, its rows of S (rows, columns), and where each is in the sequence. at: of S."""
        count = cute.size(s, mode=[0]) // len(state.shares)
        return [
            (
                share,
                some_rows(s, i * count, count),
                lambda r, i=i: row_of(self.config, job, warpgroup, at[r + i * count, 0][0]),
            )
            for i, share in enumerate(state.shares)
        ]

    def exponentiate(self, state: State, change: Change, columns: range | None = None) -> None:
        """S becomes P in place, in these columns or in all."""
        state.softmax.exponentials(rows_by_columns(state.s), *change, columns)

    @cute.jit
    def lower(self, softmax: OnlineSoftmax, s: cute.Tensor, shifts: cute.Tensor):
        """S lowered where it is large, unless no row of the warp is."""
        if cute.arch.vote_any_sync(is_large(shifts[0]) | is_large(shifts[1])):
            softmax.lower(s, shifts)

    def to_p(self, job: Job, state: State, n: Int32, warpgroup: Int32) -> None:
        """P of KV block n as the next product's operand: half the registers, from here on."""
        if self.problem.dropout:
            s, at = rows_by_columns(state.s), coordinates(self.qk(), self.config.tile_n)
            for share, rows, row in self.parts(job, state, s, at, warpgroup):
                share.dropout.apply(rows, row, n * self.config.tile_n, cute.arch.thread_idx()[0])
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
