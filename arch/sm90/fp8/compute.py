"""The compute role in FP8: as for 16 bits, but for what 8 bits need.

    S = Q K[n-1] begun   part = P V[n], first piece, begun   wait S   S *= scales of its blocks   max(S)
    piece by piece: some of the next P = 2**8 exp(S) in 8 bits   wait part
                    O = O * rescale + part * scale of V's block   the next piece begun
    the rest of the next P   P = the next P

P, of 2**8 at most, uses what e4m3 holds; the row sum is that of the rounded P. The tensor core's own sum
keeps some 14 bits, so it is taken over by O, in fp32, after every tile (two-level accumulation), or as the
config's `promotion` says: accumulation.py.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float16, Float32, Int32, pipeline

from ...common.job import Job, Launch, visits_of
from ...common.memory import Tiles
from ...common.operand import Operand
from ...common.order import compute_before_wait, pin
from ...common.softmax import LOG2_E, OnlineSoftmax, exp2
from ...elementwise import minimum
from ...quantized import QuantizedProblem, Scales
from ..edge import Edge
from ..forward.compute import Change, Compute, Share
from ..forward.job import job_of
from ..forward.rows import ROW_LANES, heads_of_thread
from ..mma import ROWS, accumulator, wait
from .accumulation import Sums, accumulation
from .config import TRANSPOSED, Config
from .matrices import address, read, swizzled
from .mma import KEYS, added, operand_a, rounded, step, tiled_mma, words

LIFT = 8  # P is multiplied by 2**LIFT
SUMMED = 16  # numbers of a row, that are added up in float16


class Ends(NamedTuple):
    q: pipeline.PipelineConsumer
    k: pipeline.PipelineConsumer


class AllTiles(NamedTuple):
    """transposed: of V, (columns, keys, slots)."""

    tiles: Tiles
    transposed: cute.Tensor


class State(NamedTuple):
    """As for 16 bits, but q may be registers. v: (mma, pieces of columns, k, slots). p: in operand A's order.

    next_p: what P will be, words of four. sums: O, and how products join it.
    scales: of the job's heads. factor: of S, or of q alone where K has one for each block.
    """

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    s: cute.Tensor
    p: cute.Tensor
    next_p: cute.Tensor
    sums: Sums
    softmax: OnlineSoftmax
    shares: tuple[Share, ...]
    scales: Scales
    factor: Float32

    @property
    def o(self) -> cute.Tensor:
        return self.sums.o


class QuantizedCompute(Compute):
    """The same masks, turns and stores. q, out: the operands."""

    def __init__(self, problem: QuantizedProblem, config: Config, q: Operand, out: Operand):
        super().__init__(problem, config, out)
        self.q = q

    @cute.jit
    def run(self, launch: Launch, tiles: AllTiles, ends: Ends, edge: Edge, warpgroup: Int32):
        self.first_turn(warpgroup)
        job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
        if job.first_row < job.sequence.q_rows:
            state = self.state(job, tiles, warpgroup)
            self.blocks(job, state, tiles.tiles, ends, edge, warpgroup)
            self.close(state)
            self.store.tile(job, tiles.tiles, state, warpgroup)
        self.store.finish()
        self.last_turn(warpgroup)

    @cute.jit
    def blocks(self, job: Job, state: State, tiles: Tiles, ends: Ends, edge: Edge, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.shares[0].rules)
        if visits.any():
            ends.q.wait_and_advance()
            k = ends.k.wait_and_advance()
            if cutlass.const_expr(self.config.keeps_q):
                self.read_q(state, tiles.q[None, None, warpgroup])
            self.begin_s(state, k)
            wait(0, state.s)
            k.release()
            n, turn = visits.block(visits.start), Int32(0)
            change = self.raise_max(job, state, n, True, warpgroup)
            self.exponentiate(state, change, 0, 1)
            self.to_p(state, change)
            rest = visits.rest()
            # Without a mask only the first block visited is partly hidden, and that is done.
            phases = rest.phases if self.problem.mask else rest.phases[1:]
            pieces, parts = state.sums.pieces, self.parts_of_p(state)
            for p in cutlass.range_constexpr(len(phases)):
                masked = phases[p].masked
                for i in cutlass.range(phases[p].visits, unroll=1):
                    before, n = n, rest.block(rest.nth(phases[p], i))
                    k = ends.k.wait_and_advance()
                    slot = edge.of(turn % TRANSPOSED)
                    self.await_turn(warpgroup)
                    self.begin_s(state, k)
                    slot.wait_full(turn // TRANSPOSED)
                    self.begin_pv(state, turn % TRANSPOSED, 0)
                    self.end_turn(warpgroup)
                    scale = self.scale_of_v(state, before)
                    wait(1, state.s)
                    k.release()
                    change = self.raise_max(job, state, n, masked, warpgroup)
                    for piece in cutlass.range_constexpr(pieces):
                        self.beside(state, change, piece)
                        wait(0, state.sums.part)
                        self.take_over(state, piece, turn, scale)
                    slot.warp_emptied()
                    self.exponentiate(state, change, parts - 1, parts)
                    self.to_p(state, change)
                    turn += 1
            edge.of(turn % TRANSPOSED).wait_full(turn // TRANSPOSED)
            last_scale = self.scale_of_v(state, n)
            for piece in cutlass.range_constexpr(pieces):
                self.begin_pv(state, turn % TRANSPOSED, piece)
                wait(0, state.sums.part)
                self.finish(state, piece, last_scale)

    def state(self, job: Job, all_tiles: AllTiles, warpgroup: Int32) -> State:
        tiles, transposed = all_tiles
        columns = self.config.tile_n
        s, o = accumulator(columns), accumulator(self.dim_v)
        o.fill(0.0)
        sums = accumulation(o, self.config.promotion, self.config.piece(self.dim_v), self.config.spans)
        qk, pv = self.qk(), self.pv(self.columns_of(sums))
        scales, factor = self.scales(job, warpgroup)
        shares = tuple(self.share(job, head) for head in heads_of_thread(self.config, job, warpgroup))
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        softmax_scale = LOG2_E if self.problem.score else job.call.softmax_scale * LOG2_E
        if self.problem.block is None and self.problem.score:
            shares = tuple(scaled(share, factor) for share in shares)
        elif self.problem.block is None:
            softmax_scale = softmax_scale * factor
        return State(
            q=self.q_operand(tiles.q[None, None, warpgroup]),
            k=qk.make_fragment_B(qk.get_slice(0).partition_B(tiles.k)),
            v=pv.make_fragment_B(pv.get_slice(0).partition_B(transposed)),
            s=s,
            p=cute.make_rmem_tensor(cute.size(s), Float8E4M3FN),
            next_p=cute.make_rmem_tensor(cute.size(s) // 4, Int32),
            sums=sums,
            softmax=OnlineSoftmax.create(2, Float32(softmax_scale), ROW_LANES),
            shares=shares,
            scales=scales,
            factor=factor,
        )

    def scales(self, job: Job, warpgroup: Int32) -> tuple[Scales, Float32]:
        """Those of the job's heads, and what is the same for all scores of a warpgroup."""
        batch, kv, head = job.sequence.batch, job.heads.kv, job.heads.first
        scales = job.call.q_scale, job.call.k_scale, job.call.v_scale
        if self.problem.block is None:
            q, k, v = (tensor[batch, kv] for tensor in scales)
            return Scales(q, k, v), q * k
        q, k, v = scales[0][batch, head, None], *(x[batch, kv, None] for x in scales[1:])
        block = (job.first_row + warpgroup * ROWS) // self.problem.block
        return Scales(q, k, v), q[minimum(block, q.shape[0] - 1)]

    def q_operand(self, tile: cute.Tensor) -> cute.Tensor:
        """Q as products take it: its tile, or registers for it."""
        if self.config.keeps_q:
            return operand_a(cute.make_rmem_tensor(self.q.columns * ROWS // 128, self.dtype))
        return self.qk().make_fragment_A(self.qk().get_slice(0).partition_A(tile))

    def read_q(self, state: State, tile: cute.Tensor) -> None:
        """Q's tile to registers: 16 rows of each warp."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx() % 4
        row, width = warp * 16 + lane % 16, self.q.width
        rows = swizzled(self.q, row * width + lane // 16 * 16)
        words = cute.recast_tensor(cute.make_tensor(state.q.iterator, cute.size(state.q)), Int32)
        for column in range(0, self.q.columns, KEYS):
            part, inside = divmod(column, width)
            of_step = cute.make_tensor(words.iterator + column // KEYS * 4, cute.make_layout(4))
            read(address(tile) + part * (width * ROWS) + (rows ^ inside), of_step, transposed=False)

    def qk(self) -> cute.TiledMma:
        return tiled_mma(self.config.tile_n, self.config.keeps_q, self.dtype, self.dtype)

    def pv(self, columns: int | None = None) -> cute.TiledMma:
        """Of so many of V's columns, or of all."""
        return tiled_mma(columns or self.dim_v, True, Float8E4M3FN, self.dtype)

    def columns_of(self, sums: Sums) -> int:
        """Columns of a piece of a product."""
        return self.dim_v * sums.spans // sums.pieces

    def begin_pv(self, state: State, slot: Int32, piece: int) -> None:
        """A piece of P V, of the transposed V tile in `slot`."""
        columns, span = divmod(piece, state.sums.spans)
        steps, v = self.config.tile_n // KEYS, state.v[None, columns, None, slot]
        begin, end = (steps * i // state.sums.spans for i in (span, span + 1))
        state.sums.begin(
            self.pv(self.columns_of(state.sums)), [step(state.p, v, k) for k in range(begin, end)]
        )

    def scale_scores(self, state: State, n: Int32) -> None:
        """S as if q and k had not been divided by the scales of their blocks."""
        if self.problem.block is not None:
            factor = state.factor * state.scales.k_scale[self.scale_block(n)]
            for i in range(cute.size(state.s)):
                state.s[i] = state.s[i] * factor

    def scale_block(self, n: Int32) -> Int32:
        """Of which block of scales KV block n is a part."""
        return n // (self.problem.block // self.config.tile_n)

    def scale_of_v(self, state: State, n: Int32) -> Float32 | None:
        """What the product of block n is multiplied by, where V has scales of blocks."""
        return None if self.problem.block is None else state.scales.v_scale[self.scale_block(n)]

    def raise_max(self, job: Job, state: State, n: Int32, masked: bool, warpgroup: Int32) -> Change:
        """As for 16 bits, of scores that are scaled."""
        self.scale_scores(state, n)
        return super().raise_max(job, state, n, masked, warpgroup)

    def parts_of_p(self, state: State) -> int:
        """Parts that P is computed in: one beside each piece of a product but the first of several, which is
        there when max(S) is, and one after all.
        """
        return max(state.sums.pieces, 2)

    def beside(self, state: State, change: Change, piece: int) -> None:
        """What is computed beside a piece of a product."""
        parts = self.parts_of_p(state)
        part = piece - (state.sums.pieces - parts + 1)
        if part >= 0:
            self.exponentiate(state, change, part, parts)
            compute_before_wait(state.softmax.row_sum[0], state.softmax.row_sum[1])

    def exponentiate(self, state: State, change: Change, part: int, parts: int) -> None:
        """One of so many parts of S becomes the next P, and joins the row sum as it is rounded.

        SUMMED rounded numbers at a time, 2**8 at most, are added up in float16, to two sums: each addition is
        off by 2**-12 of its sum at most, up or down.
        """
        s, rescale, row_sum = words(state.s), change.rescale, state.softmax.row_sum
        steps, together, last = self.config.tile_n // KEYS, 2 * SUMMED // 4, part == parts - 1
        begin, end = (steps * i // parts * 4 for i in (part, part + 1))
        for r in range(cute.size(rescale)):
            total = row_sum[r] if part else row_sum[r] * rescale[r]
            for first in range(begin, end, together):
                of_row = range(first + r, min(first + together, end), 2)
                pair = cute.make_rmem_tensor(2, Float16)
                pair.store(added([self.word(state, s, word, change, merged=last) for word in of_row]))
                total = total + pair[0].to(Float32) + pair[1].to(Float32)
            row_sum[r] = total

    def word(self, state: State, s: cute.Tensor, word: int, change: Change, merged: bool) -> cute.TensorSSA:
        """Four numbers of S, (4, words), become a word of the next P; (2,) float16: sums of two and two.

        merged: at once; it may not while a product reads the P that is.
        """
        shift, scale = LIFT - change.shifts[word % 2], state.softmax.scale_log2
        p = [exp2(cute.math.fma(s[i, word], scale, shift)) for i in range(4)]
        state.next_p[word], sums = rounded(p, merged)
        return sums

    def to_p(self, state: State, change: Change) -> None:
        """The next P becomes the next product's operand, and what is summed follows its maximum."""
        p = cute.recast_tensor(state.p, Int32)
        for i in range(cute.size(p)):
            p[i] = state.next_p[i]
        pin(state.p)
        state.sums.follow(change.rescale)

    def take_over(self, state: State, piece: int, turn: Int32, scale: Float32 | None) -> None:
        """A piece of product `turn`, to be multiplied by `scale`, joins what is summed; the next is begun."""
        state.sums.take_over(piece, turn, scale)
        if piece + 1 < state.sums.pieces:
            self.begin_pv(state, turn % TRANSPOSED, piece + 1)

    def finish(self, state: State, piece: int, scale: Float32 | None) -> None:
        """A piece of the last product joins O."""
        state.sums.finish(piece, scale)

    def close(self, state: State) -> None:
        """Take the lift off what is summed, and put on V's scale where all of it has one."""
        factor = Float32(2.0**-LIFT)
        if self.problem.block is None:
            factor = factor * state.scales.v_scale
        for r in range(cute.size(state.softmax.row_sum)):
            state.softmax.row_sum[r] = state.softmax.row_sum[r] * 2.0**-LIFT
        for i in range(cute.size(state.o)):
            state.o[i] = state.o[i] * factor


def scaled(share: Share, factor: Float32) -> Share:
    """With rules that take scores as products of quantized numbers."""
    return share._replace(rules=share.rules._replace(scale=share.rules.scale * factor))
