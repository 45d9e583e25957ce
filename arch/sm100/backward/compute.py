"""The compute role: two warpgroups, half of a tile's rows of Q each, of one key for a thread or for two.

    wait S    P = exp(S - LSE) -> over S     wait dP    dS = P (dP - D) -> over dP, and to shared memory
    in the end    dK, dV

Scores lie transposed, so that P^T and dS^T are operands of dV and dK where they are, in tensor memory: only
dQ, which sums over keys, takes dS from shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common.dropout import Dropout
from ...common.element import element_type
from ...common.key_block import KeyBlock, Launch
from ...common.numeric import both, packed
from ...common.order import depend_on_load, pin
from ...common.rules import Rules
from ...common.softmax import LOG2_E, exp2
from ...elementwise import where
from ...problem import Problem
from ..group import Group
from ..tmem import registers, some_columns, stored
from .config import CHUNK, THREADS, Config
from .job import Edges, Memory, key_block
from .plan import Plan
from .store import Result, to_row
from .threads import threads_of

PIECE = 8  # rows that are worked on at a time


class Key(NamedTuple):
    """A thread's key, and how its scores become probabilities. warpgroup: which half of a tile is its own."""

    warpgroup: Int32
    thread: Int32  # of the warpgroup
    place: Int32  # of the key, in the tile
    number: Int32
    rules: Rules
    dropout: Dropout | None
    scale_log2: Float32


class Compute:
    """plan: where S, P, dP and dS are. result: where dK and dV go. group: of CTAs."""

    def __init__(self, problem: Problem, config: Config, plan: Plan, result: Result, group: Group):
        self.problem, self.config, self.plan, self.result, self.group = problem, config, plan, result, group
        self.p_dtype = element_type(problem.p_precision)
        self.ds_dtype = element_type(config.ds_precision(problem))
        self.threads = threads_of(plan.keys, group)
        self.rows = plan.half_rows // plan.sharers  # of a thread
        self.chunk = min(CHUNK, self.rows)

    @cute.jit
    def run(
        self, launch: Launch, memory: Memory, edges: Edges, numbers: pipeline.PipelineConsumer, warp: Int32
    ):
        block, memory = key_block(self.problem, self.config, launch), memory.looked_up()
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        key = self.key(block, rules, warp // 4)
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            for i in cutlass.range(phases[p].visits, unroll=1):
                place = visits.nth(phases[p], i)
                turn, first_row = Int32(visits.turn(place)), Int32(visits.block(place)) * self.config.tile_m
                first_row += self.first(key, 1)
                weights = registers(self.rows)
                slot = numbers.wait_and_advance()
                edges.s.wait_full(turn)
                self.load(key, memory, "s", 0, weights)
                if cutlass.const_expr(self.config.s_emptied):
                    edges.s.warp_emptied(self.group)
                self.wait_for_p(edges, turn)
                kept = self.to_p(key, memory, weights, slot.index, first_row, phases[p].masked)
                self.written("p")
                edges.p.warp_filled(self.group)
                edges.dp.wait_full(turn)
                self.wait_until_free(edges, turn)
                self.to_ds(key, memory, weights, slot.index, kept, block.call.keep_scale)
                slot.release()
                self.written("ds")
                edges.ds.warp_filled(self.group)
                self.send(key, memory, edges)
        if visits.any():
            edges.grad_kv.wait_full(0)
        self.result.store(block, memory, visits, key.warpgroup)

    def key(self, block: KeyBlock, rules: Rules, warpgroup: Int32) -> Key:
        thread = cute.arch.thread_idx()[0] % THREADS
        place = self.threads.key(thread)
        # A score rule takes scaled scores, so that only the change of base is left.
        scale = 1.0 if self.problem.score else block.call.softmax_scale
        return Key(
            warpgroup=warpgroup,
            thread=thread,
            place=place,
            number=block.first_key + place,
            rules=rules,
            dropout=Dropout.of(self.problem, block.call, block.sequence, block.head),
            scale_log2=Float32(scale * LOG2_E),
        )

    def first(self, key: Key, unit: int) -> Int32:
        """The first of a tile's rows that are a thread's, in units of rows."""
        part = self.threads.part(key.thread, self.rows // unit)
        return key.warpgroup * (self.plan.half_rows // unit) + part

    def load(self, key: Key, memory: Memory, name: str, first: int, row: cute.Tensor) -> None:
        """Read S or dP, from the thread's row `first` on."""
        place = self.plan.half(name, key.warpgroup) + first
        self.threads.load(memory.tensor, place, self.plan.half_rows, row, key.thread)

    def store(self, key: Key, memory: Memory, name: str, first: int, rounded: cute.Tensor) -> None:
        """Write P or dS, several rows to a column, likewise."""
        per_column = self.plan.per_column
        place = self.plan.half(name, key.warpgroup) + first // per_column
        span = self.plan.half_rows // per_column
        self.threads.store(words(rounded), memory.tensor, place, span, key.thread)

    def written(self, name: str) -> None:
        """Products may read what this thread has written of P, or dS, when an arrival tells."""
        stored()
        if name == "ds":
            cute.arch.fence_proxy("async.shared", space="cta")

    def to_p(
        self, key: Key, memory: Memory, weights: cute.Tensor, slot: Int32, first_row: Int32, masked: bool
    ) -> list[Int32]:
        """S becomes, in place, what dP - D is multiplied by: P, times the slope of the score rule.

        P itself, less what dropout takes, goes to tensor memory. Returned are bits of rows kept, by `chunk`.
        """
        kept, lse = [], memory.tiles.lse[None, slot]
        for c in range(0, self.rows, self.chunk):
            s = some_columns(weights, c, self.chunk)
            row, number = (depend_on_load(s[0], x) for x in (first_row + c, key.number))
            if key.dropout is not None:
                drawn, lane = key.dropout.after(s[0]), key.thread % 32
                kept.append(drawn.keeps_of_key(row, number, lane, self.chunk, self.threads.neighbours))
            rounded = registers(self.chunk, self.p_dtype)
            for r in range(0, self.chunk, PIECE):
                p, target = some_columns(s, r, PIECE), some_columns(rounded, r, PIECE)
                slopes = self.scored(key, p, row + r, number, masked)
                self.exponentials(key, p, lse, c + r)
                self.round(p, target, kept[-1] >> r if kept else None)
                if self.problem.score is not None:
                    self.slope(p, slopes)
                    # Registers are scarce: nothing of the next piece is worked out meanwhile.
                    row = depend_on_load(p[PIECE - 1], row)
            self.store(key, memory, "p", c, rounded)
        return kept

    def scored(
        self, key: Key, s: cute.Tensor, row: Int32, number: Int32, masked: bool
    ) -> cute.Tensor | float:
        """Neighbouring rows of S by the rules; their slopes."""
        by_row = cute.make_tensor(s.iterator, cute.make_layout((cute.size(s), 1)))
        return key.rules.apply_with_slopes(by_row, lambda r: row + r, lambda _: number, masked)

    def exponentials(self, key: Key, s: cute.Tensor, lse: cute.Tensor, first: int) -> None:
        """Rows of S, from the thread's row `first` on, become P in place."""
        for r, exponents in self.by_four(key, lse, first, cute.size(s)):
            for i in (0, 2):
                # The other way round, since exponents can be negated on their way into ex2, LSE not.
                pair = s[r + i], s[r + i + 1]
                x = packed().fma(pair, both(-key.scale_log2), (exponents[i], exponents[i + 1]))
                s[r + i], s[r + i + 1] = exp2(-x[0]), exp2(-x[1])

    def slope(self, p: cute.Tensor, slopes: cute.Tensor | float) -> None:
        """P times the slopes; one that is no number, of a pair without weight, counts for nothing."""
        for r in range(cute.size(p)):
            slope = slopes if isinstance(slopes, float) else slopes[r, 0]
            p[r] = where(p[r] == 0.0, 0.0, p[r] * slope)
        pin(p)

    def to_ds(
        self, key: Key, memory: Memory, weights: cute.Tensor, slot: Int32, kept: list[Int32],
        keep_scale: Float32 | None,
    ) -> None:
        """dS = weights * (dP - D), where dP was, and in shared memory."""
        delta = memory.tiles.delta[None, slot]
        for c in range(0, self.rows, self.chunk):
            dp, ds = registers(self.chunk), registers(self.chunk, self.ds_dtype)
            self.load(key, memory, "dp", c, dp)
            place = depend_on_load(dp[0], key.place)
            for r in range(0, self.chunk, PIECE):
                piece, weight = some_columns(dp, r, PIECE), some_columns(weights, c + r, PIECE)
                if kept:
                    drop(piece, kept[c // self.chunk] >> r, keep_scale)
                self.differentiate(key, piece, weight, delta, c + r)
                self.round(piece, some_columns(ds, r, PIECE))
            self.store(key, memory, "ds", c, ds)
            self.share(key, memory, ds, place, c)

    def share(self, key: Key, memory: Memory, ds: cute.Tensor, place: Int32, first: int) -> None:
        """dS, from the thread's row `first` on, of the key at `place` to shared memory, for dQ."""
        row, column = self.place_of_ds(key, place)
        to_row(ds, memory.tiles.ds[row, None, 0], column + first)

    def place_of_ds(self, key: Key, place: Int32) -> tuple[Int32, Int32 | int]:
        """Row and first column in shared memory, where dP's are (place, the thread's first row)."""
        return place, self.first(key, 1)

    @cute.jit
    def wait_for_p(self, edges: Edges, turn: Int32):
        """Until P may be written: over what the warp has read itself, or where dV has read the one before."""
        if cutlass.const_expr(self.config.p_apart):
            edges.p.wait_empty(turn)

    def wait_until_free(self, edges: Edges, turn: Int32) -> None:
        """Until dS may be written in shared memory: dP is computed after dQ, which read the one before."""

    def send(self, key: Key, memory: Memory, edges: Edges) -> None:
        """What happens to dS besides, when it is in shared memory: nothing."""

    def differentiate(
        self, key: Key, dp: cute.Tensor, weights: cute.Tensor, delta: cute.Tensor, first: int
    ) -> None:
        """Rows of dP, from the thread's row `first` on, become weights * (dP - D) in place."""
        for r, shifts in self.by_four(key, delta, first, cute.size(dp)):
            for i in (0, 2):
                pair, weight = ((x[r + i], x[r + i + 1]) for x in (dp, weights))
                difference = self.difference(pair, (shifts[i], shifts[i + 1]))
                ds = cute.arch.mul_packed_f32x2(difference, weight, rnd="rn", ftz=False)
                dp[r + i], dp[r + i + 1] = ds

    def difference(self, dp: tuple[Float32, Float32], delta: tuple[Float32, Float32]) -> tuple:
        """dP - D of two rows."""
        return packed().fma(delta, both(-1.0), dp)

    def by_four(
        self, key: Key, numbers: cute.Tensor, first: int, count: int
    ) -> Iterator[tuple[int, cute.Tensor]]:
        """(r, LSE or D of row `first` + r and the three below) of `count` rows, read as their turn comes."""
        for r in range(0, count, 4):
            four = cute.make_rmem_tensor(4, Float32)
            place = self.first(key, 4) + (first + r) // 4
            cute.autovec_copy(cute.local_tile(numbers, (4,), (place,)), four)
            yield r, four

    def round(self, numbers: cute.Tensor, target: cute.Tensor, kept: Int32 | None = None) -> None:
        """Numbers into few bits, several in a register from here on; 0 where the row's bit is not set."""
        if kept is not None:
            all_of_them, numbers = numbers, registers(cute.size(numbers))
            for r in range(cute.size(numbers)):
                numbers[r] = where(is_set(kept, r), all_of_them[r], 0.0)
        target.store(numbers.load().to(target.element_type))
        pin(target)


def words(rounded: cute.Tensor) -> cute.Tensor:
    """As 32-bit words of several elements."""
    return cute.recast_tensor(rounded, Float32)


def drop(dp: cute.Tensor, kept: Int32, keep_scale: Float32) -> None:
    """What dropout does to dP: 0 where a row's bit is not set."""
    for r in range(cute.size(dp)):
        dp[r] = where(is_set(kept, r), dp[r] * keep_scale, 0.0)


def is_set(bits: Int32, i: int):
    """Whether bit `i` is."""
    return (bits >> i & 1) != 0
