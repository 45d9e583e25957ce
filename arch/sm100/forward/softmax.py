"""The softmax role: a warpgroup for each Q tile, one row per thread.

    wait S   load S   rules   maximum -> factor to the correction   P = exp2(S - max) -> over S   sum P
    in the end   log-sum-exp   1 / sum -> to the correction
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ...common.dropout import Dropout
from ...common.order import after
from ...common.output import OutputRows
from ...common.rules import Rules
from ...common.softmax import LOG2_E, OnlineSoftmax
from ...problem import Problem
from ..group import Group
from ..tmem import Plan, columns, load, load_with_max, registers, store, stored
from ..tuning import TILE_M, Config
from .job import Job, Work, row_of_thread, turns_of, visits_of
from .output import Partial, Result
from .rows import accumulate, exponentials, largest, raise_max

CHUNK = 32  # columns whose exponentials are computed before they are stored


class Row(NamedTuple):
    """One thread's row: its number in the sequence, its place among a tile's, its state.

    tensor: tensor memory. factors: its part of `Memory.factors`.
    """

    number: Int32
    tile: Int32
    thread: Int32
    softmax: OnlineSoftmax
    rules: Rules
    dropout: Dropout | None
    tensor: cute.Pointer
    factors: cute.Tensor


class Softmax:
    """plan: where S and P are. output: where the log-sum-exp goes."""

    fetches_tiles = False

    def __init__(self, problem: Problem, config: Config, dtype: type, plan: Plan, output: Result | Partial):
        self.problem, self.config, self.dtype, self.plan = problem, config, dtype, plan
        self.group, self.output = Group(config.ctas), output

    @cute.jit
    def run(self, work: Work, ends: tuple, warp: Int32):
        """One tile; no ends, and how many blocks it was."""
        row = self.row(work, warp // 4)
        visits = visits_of(self.problem, self.config, work.job, row.rules)
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            for i in cutlass.range(phases[p].visits, unroll=1):
                place = visits.nth(phases[p], i)
                self.block(row, work, visits.block(place), visits.turn(place), phases[p].masked)
        self.finish(row, work)
        return ends, turns_of(visits)

    def close(self, ends: tuple, warp: Int32) -> None:
        """The correction sees the rest through."""

    @cute.jit
    def block(self, row: Row, work: Work, n: Int32, turn: Int32, masked: cutlass.Constexpr):
        """Block n of the keys, the turn-th of the tile that is visited: S becomes P."""
        turn = work.past.turns + turn
        place, column = self.plan.place(row.tile, turn), self.plan.s(row.tile, turn)
        s, factors = work.edges.s.of(place), work.edges.factors.of(place)
        scores = registers(self.config.tile_n)
        s.wait_full(turn // self.config.slots)
        most = self.fetch(row, columns(row.tensor, column, self.config.tile_n), scores, n, masked)
        first_key = n * self.config.tile_n
        factor = raise_max(row.softmax, most)
        row.factors[self.plan.slot(turn)] = factor
        factors.warp_filled()
        # What a mask hides must be exactly 0, which ex2 makes of -inf.
        polynomial = 0 if masked else self.config.polynomial
        for c in cutlass.range_constexpr(0, self.config.tile_n, CHUNK):
            exponentials(row.softmax, scores, range(c, c + CHUNK), polynomial)
            p = self.rounded(row, scores, c, first_key)
            store(p, columns(row.tensor, column + c // 2, CHUNK // 2), row.thread)
        stored()
        s.warp_emptied(self.group)
        accumulate(row.softmax, scores, factor)

    def fetch(self, row: Row, source: cute.Tensor, scores: cute.Tensor, n: Int32, masked: bool) -> Float32:
        """S of block n, by the rules; its maximum."""
        if self.config.reducing_loads and not row.rules.change(masked):
            return load_with_max(source, scores, row.thread)
        load(source, scores, row.thread)
        first_key = n * self.config.tile_n
        number = after(scores[0], row.number)
        row.rules.apply(scores, lambda r: number, lambda c: first_key + c, masked)
        return largest(scores)

    @cute.jit
    def finish(self, row: Row, work: Work):
        """The log-sum-exp is written, and the correction told what normalises O."""
        _, head = row_of_thread(self.config, work.job, row.tile)
        exists = Boolean(True) if self.config.heads == 1 else head < work.job.heads.end
        factor = self.output_rows(work.job, head).close(row.softmax, 0, row.number, exists)
        final_scale = work.edges.final_scale.of(row.tile)
        if cutlass.const_expr(self.config.is_persistent):
            final_scale.wait_empty(work.past.tiles)
        row.factors[self.plan.slots] = factor
        final_scale.warp_filled()

    def output_rows(self, job: Job, head: Int32) -> OutputRows:
        problem, call, sequence = self.problem, job.call, job.sequence
        head = job.heads.known(self.config.heads, head)
        return OutputRows(
            used=sequence.seqlen_q if problem.seqused_q else None,
            end=sequence.q_rows,
            lse=sequence.lse_of(self.output.lse(job), head) if problem.lse else None,
            sink=call.sink[head] if problem.sink else None,
            factor=call.keep_scale if problem.dropout else None,
        )

    def rounded(self, row: Row, scores: cute.Tensor, first: int, first_key: Int32) -> cute.Tensor:
        """CHUNK columns of P, less what dropout takes, as 32-bit words of two elements."""
        chunk = cute.make_tensor(scores.iterator + first, cute.make_layout((1, CHUNK), stride=(CHUNK, 1)))
        if row.dropout is not None:
            kept = registers(CHUNK)
            kept.store(chunk.load())
            row.dropout.apply_to_row(kept, row.number, first_key + first)
            chunk = kept
        p = registers(CHUNK, self.dtype)
        p.store(chunk.load().to(self.dtype))
        return cute.recast_tensor(p, cutlass.Float32)

    def row(self, work: Work, tile: Int32) -> Row:
        job, memory, call = work.job, work.memory, work.job.call
        thread = cute.arch.thread_idx()[0] % TILE_M
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        scale = 1.0 if self.problem.score else call.softmax_scale
        number, head = row_of_thread(self.config, job, tile)
        head = job.heads.known(self.config.heads, head)
        return Row(
            number=number,
            tile=tile,
            thread=thread,
            softmax=OnlineSoftmax.create(1, scale * LOG2_E, ()),
            rules=Rules.of(self.problem, call, job.sequence, head),
            dropout=self.dropout(job, head),
            tensor=memory.tensor,
            factors=memory.factors[thread, None, tile],
        )

    def dropout(self, job: Job, head: Int32) -> Dropout | None:
        """The random numbers of a head, where the problem has dropout."""
        if not self.problem.dropout:
            return None
        call = job.call
        place = job.sequence.batch * call.q.shape[-2] + head
        return Dropout.of(call.rng_state, place, call.keep_threshold)
