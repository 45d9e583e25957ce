"""The softmax role: a warpgroup for each Q tile, one row per thread.

    wait S   load S   rules   maximum -> factor to the correction   P = exp2(S - max) -> over S   sum P
    in the end   log-sum-exp   1 / sum -> to the correction
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ...common.columns import Keys
from ...common.dropout import Dropout
from ...common.order import after, depend_on_load
from ...common.output import OutputRows
from ...common.rules import Rules
from ...common.softmax import LOG2_E, OnlineSoftmax, is_large
from ...problem import Problem
from ..config import CHUNK, TILE_M, Config
from ..edge import Edge
from ..group import Group
from ..tmem import Plan, columns, load, load_with_max, registers, some_columns, store, stored
from .job import Work, row_of_thread, turns_of, visits_of
from .output import Partial, Result
from .rows import THRESHOLD, accumulate, add_up, exponentials, largest, raise_max, sums_of, take_in

PIECE = 16  # of them fetched at a time where S is lowered: with more, kernels of heavy rules spill


class Row(NamedTuple):
    """One thread's row: its number in the sequence, its place among a tile's, its state.

    tensor: tensor memory. factors: its part of `Memory.factors`. scales: of what is quantized. p: its row of
    P, where that lies in shared memory.
    """

    number: Int32
    tile: Int32
    thread: Int32
    softmax: OnlineSoftmax
    rules: Rules
    dropout: Dropout | None
    tensor: cute.Pointer
    factors: cute.Tensor
    scales: Any = None
    p: cute.Tensor | None = None


class First(NamedTuple):
    """The first columns of a block's S and P in tensor memory."""

    s: Int32
    p: Int32


class Softmax:
    """plan: where S and P are. output: where the log-sum-exp goes."""

    fetches_tiles = False
    threshold = THRESHOLD  # the maximum lags so far behind

    def __init__(self, problem: Problem, config: Config, dtype: type, plan: Plan, output: Result | Partial):
        self.problem, self.config, self.dtype, self.plan = problem, config, dtype, plan
        self.group, self.output = Group(config.ctas), output
        self.width = config.tile_n  # columns of S that a thread has
        self.packed = 32 // problem.p_precision.bits  # P's in a column of tensor memory

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
        place = self.plan.place(row.tile, turn)
        first = First(self.plan.s(row.tile, turn), self.plan.p(row.tile, turn))
        s, factors = work.edges.s.of(place), work.edges.factors.of(place)
        tail = work.edges.tail.of(place) if self.config.tail else None
        scores, first_key = registers(self.width), self.first_key(row, n)
        row = self.at_block(row, first_key)
        s.wait_full(turn // self.config.slots)
        most = self.fetch(row, columns(row.tensor, first.s, self.width), scores, first_key, masked)
        factor = raise_max(row.softmax, self.of_row(row, work, turn, most), self.threshold)
        row.factors[self.plan.slot(turn)] = self.of_output(row, factor)
        factors.warp_filled()
        self.wait_for_room(work, turn)
        shift = row.softmax.shifts()[0]
        if cute.arch.vote_any_sync(is_large(shift)):
            self.lowered(row, first, first_key, factor, masked)
            self.told(self.width - self.config.tail, s, tail)
            if cutlass.const_expr(self.config.tail):
                self.told(self.width, s, tail)
        else:
            for c in cutlass.range_constexpr(0, self.width, CHUNK):
                chunk = some_columns(scores, c, CHUNK)
                if cutlass.const_expr(c and c == self.width - self.config.tail):
                    # Else exponentials of all columns are mixed, and those that are waited for come late.
                    shift = after(scores[0, c - 1], shift)
                self.to_p(row, chunk, shift, first.p + c // self.packed, first_key + c, masked)
                self.told(c + CHUNK, s, tail)
            accumulate(row.softmax, scores, factor)

    def told(self, columns: int, s: Edge, tail: Edge | None) -> None:
        """P's first `columns` are stored: the mma role is told, if it waits for just these."""
        if columns == self.width - self.config.tail:
            stored()
            s.warp_emptied(self.group, tensor=True)
        elif columns == self.width:
            stored()
            tail.warp_filled(self.group, tensor=True)

    @cute.jit
    def lowered(self, row: Row, first: First, first_key: Int32, factor: Float32, masked: cutlass.Constexpr):
        """P where rows of the warp are large: S is fetched again, and lowered.

        The other rows' bits are as ever. A path of its own, some columns at a time: where scores that it has
        changed met those as they were, ptxas would spill them.
        """
        sums = sums_of(row.softmax, factor)
        for c in cutlass.range(0, self.width, CHUNK, unroll=1):
            self.lowered_columns(row, first, c, first_key, sums, masked)
        add_up(row.softmax, sums)

    def lowered_columns(
        self, row: Row, first: First, column: Int32, first_key: Int32, sums: cute.Tensor, masked: bool
    ) -> None:
        """CHUNK columns of S, from its `column` on, become P and join the sums."""
        s, shifts = registers(CHUNK), row.softmax.shifts()
        for c in range(0, CHUNK, PIECE):
            source = columns(row.tensor, first.s + column + c, PIECE)
            self.scored(row, source, some_columns(s, c, PIECE), first_key + column + c, masked)
        row.softmax.lower(s, shifts)
        self.to_p(row, s, shifts[0], first.p + column // self.packed, first_key + column, masked)
        take_in(sums, s)

    def to_p(
        self, row: Row, s: cute.Tensor, shift: Float32, column: Int32, first_key: Int32, masked: bool
    ) -> None:
        """CHUNK columns of S become P in place, and rounded where products read it, from `column` on."""
        # What a mask hides must be exactly 0, which ex2 makes of -inf.
        exponentials(row.softmax, s, shift, 0 if masked else self.config.polynomial)
        self.put(row, self.rounded(row, s, first_key), column)

    def put(self, row: Row, words: cute.Tensor, column: Int32) -> None:
        """CHUNK elements of P, as 32-bit words, to tensor memory."""
        store(words, columns(row.tensor, column, CHUNK // self.packed), row.thread)

    def fetch(
        self, row: Row, source: cute.Tensor, scores: cute.Tensor, first_key: Int32, masked: bool
    ) -> Float32:
        """A block's S, by the rules; its maximum."""
        if self.config.reducing_loads and not row.rules.change(masked):
            return load_with_max(source, scores, row.thread)
        self.scored(row, source, scores, first_key, masked)
        return largest(scores)

    def scored(
        self, row: Row, source: cute.Tensor, scores: cute.Tensor, first_key: Int32, masked: bool
    ) -> None:
        """Columns of S from tensor memory, by the rules."""
        load(source, scores, row.thread)
        self.scale_scores(row, scores, first_key)
        number, key = (depend_on_load(scores[0], x) for x in (row.number, first_key))
        row.rules.apply(scores, lambda r: number, Keys(key, in_pairs=False), masked)

    def scale_scores(self, row: Row, scores: cute.Tensor, first_key: Int32) -> None:
        """Columns of S as products of what was given."""

    @cute.jit
    def finish(self, row: Row, work: Work):
        """The log-sum-exp is written, and the correction told what normalises O."""
        _, head = row_of_thread(self.config, work.job, row.tile)
        exists = Boolean(True) if self.config.heads == 1 else head < work.job.heads.end
        head = work.job.heads.known(self.config.heads, head)
        rows = OutputRows.of(self.problem, work.job, head, self.output.lse(work.job))
        factor = self.normaliser(row, rows, exists)
        final_scale = work.edges.final_scale.of(row.tile)
        if cutlass.const_expr(self.config.is_persistent):
            final_scale.wait_empty(work.past.tiles)
        row.factors[self.plan.slots] = factor
        final_scale.warp_filled()

    def first_key(self, row: Row, n: Int32) -> Int32:
        """The key of the thread's first column of block n."""
        return n * self.config.tile_n

    def of_row(self, row: Row, work: Work, turn: Int32, most: Float32) -> Float32:
        """A block's maximum of the whole row, where `most` is that of the thread's columns."""
        return most

    def wait_for_room(self, work: Work, turn: Int32) -> None:
        """Until P of a block may be stored: it comes over S, which this thread has read."""

    def at_block(self, row: Row, first_key: Int32) -> Row:
        """The row before the block of keys that begins with `first_key`."""
        return row

    def of_output(self, row: Row, factor: Float32) -> Float32:
        """What O is to be multiplied by, where `factor` is what the sum is."""
        return factor

    def normaliser(self, row: Row, rows: OutputRows, exists: Boolean) -> Float32:
        """What normalises the row's O; its log-sum-exp is written, where the row `exists`."""
        return rows.close(row.softmax, 0, row.number, exists)

    def rounded(self, row: Row, chunk: cute.Tensor, first_key: Int32) -> cute.Tensor:
        """CHUNK columns of P, less what dropout takes, as 32-bit words of them."""
        if row.dropout is not None:
            kept = registers(CHUNK)
            kept.store(chunk.load())
            row.dropout.apply_to_row(kept, row.number, first_key)
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
            dropout=Dropout.of(self.problem, call, job.sequence, head),
            tensor=memory.tensor,
            factors=memory.factors[thread, None, tile],
        )
