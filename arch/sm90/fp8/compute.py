"""The compute role in FP8: as for 16 bits, but for what 8 bits need.

    S = Q K[n-1] begun   part = P V[n] begun   wait S   S *= scales of its blocks   softmax(S)   wait part
    O = (O + part * scale of V's block) * rescale   P = 2**8 S in 8 bits

P, of 2**8 at most, uses what e4m3 holds; the row sum is that of the rounded P. The tensor core's own sum
keeps some 14 bits, so it is taken over by O, in fp32, after every tile (two-level accumulation), or as the
config's `promotion` says: accumulation.py.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, pipeline

from ...common.columns import Keys
from ...common.fragment import rows_by_columns
from ...common.job import Job, Launch, visits_of
from ...common.memory import Tiles
from ...common.order import pin
from ...common.softmax import LOG2_E, OnlineSoftmax, exp2
from ...elementwise import minimum
from ...quantized import Scales
from ..edge import Edge
from ..forward.compute import Compute, Share
from ..forward.job import job_of
from ..forward.rows import ROW_LANES, heads_of_thread, row_of
from ..mma import ROWS, accumulator, coordinates, wait
from .accumulation import OneLevel, TwoLevels, accumulation
from .config import TRANSPOSED
from .mma import operand_a, rounded, tiled_mma, to_p

LIFT = 8  # P is multiplied by 2**LIFT


class Ends(NamedTuple):
    q: pipeline.PipelineConsumer
    k: pipeline.PipelineConsumer


class AllTiles(NamedTuple):
    """transposed: of V, (columns, keys, slots)."""

    tiles: Tiles
    transposed: cute.Tensor


class State(NamedTuple):
    """As for 16 bits. v: of transposed tiles. p: in operand A's order. sums: O, and how products join it.

    scales: of the job's heads. factor: of S, or of q alone where K has one for each block.
    """

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    s: cute.Tensor
    p: cute.Tensor
    sums: OneLevel | TwoLevels
    softmax: OnlineSoftmax
    shares: tuple[Share, ...]
    scales: Scales
    factor: Float32

    @property
    def o(self) -> cute.Tensor:
        return self.sums.o


class QuantizedCompute(Compute):
    """The same masks, turns and stores."""

    @cute.jit
    def run(self, launch: Launch, tiles: AllTiles, ends: Ends, edge: Edge, warpgroup: Int32):
        self.first_turn(warpgroup)
        job = job_of(self.problem, self.config, launch, cute.arch.block_idx()[0])
        if job.first_row < job.sequence.q_rows:
            state = self.state(job, tiles, warpgroup)
            self.blocks(job, state, ends, edge, warpgroup)
            self.close(state)
            self.store.tile(job, tiles.tiles, state, warpgroup)
        self.store.finish()
        self.last_turn(warpgroup)

    @cute.jit
    def blocks(self, job: Job, state: State, ends: Ends, edge: Edge, warpgroup: Int32):
        visits = visits_of(self.problem, self.config, job, state.shares[0].rules)
        if visits.any():
            ends.q.wait_and_advance()
            k = ends.k.wait_and_advance()
            self.begin_s(state, k)
            wait(0, state.s)
            k.release()
            n, turn = visits.block(visits.start), Int32(0)
            self.to_p(state, self.softmax(job, state, n, True, warpgroup))
            rest = visits.rest()
            # Without a mask only the first block visited is partly hidden, and that is done.
            phases = rest.phases if self.problem.mask else rest.phases[1:]
            for p in cutlass.range_constexpr(len(phases)):
                masked = phases[p].masked
                for i in cutlass.range(phases[p].visits, unroll=1):
                    before, n = n, rest.block(rest.nth(phases[p], i))
                    k = ends.k.wait_and_advance()
                    slot = edge.of(turn % TRANSPOSED)
                    self.await_turn(warpgroup)
                    self.begin_s(state, k)
                    slot.wait_full(turn // TRANSPOSED)
                    self.begin_pv(state, turn % TRANSPOSED)
                    self.end_turn(warpgroup)
                    wait(1, state.s)
                    k.release()
                    rescale = self.softmax(job, state, n, masked, warpgroup)
                    wait(0, state.sums.part)
                    slot.warp_emptied()
                    self.take_over(state, turn, before, rescale)
                    self.to_p(state, rescale)
                    turn += 1
            edge.of(turn % TRANSPOSED).wait_full(turn // TRANSPOSED)
            self.begin_pv(state, turn % TRANSPOSED)
            wait(0, state.sums.part)
            self.finish(state, n)

    def state(self, job: Job, all_tiles: AllTiles, warpgroup: Int32) -> State:
        tiles, transposed = all_tiles
        columns = self.config.tile_n
        qk, pv = self.qk().get_slice(0), self.pv().get_slice(0)
        s, o = accumulator(columns), accumulator(self.dim_v)
        o.fill(0.0)
        scales, factor = self.scales(job, warpgroup)
        shares = tuple(self.share(job, head) for head in heads_of_thread(self.config, job, warpgroup))
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        softmax_scale = LOG2_E if self.problem.score else job.call.softmax_scale * LOG2_E
        if self.problem.block is None and self.problem.score:
            shares = tuple(scaled(share, factor) for share in shares)
        elif self.problem.block is None:
            softmax_scale = softmax_scale * factor
        return State(
            q=self.qk().make_fragment_A(qk.partition_A(tiles.q[None, None, warpgroup])),
            k=self.qk().make_fragment_B(qk.partition_B(tiles.k)),
            v=self.pv().make_fragment_B(pv.partition_B(transposed)),
            s=s,
            p=cute.make_rmem_tensor(cute.size(s), Float8E4M3FN),
            sums=accumulation(o, self.config.promotion),
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

    def qk(self) -> cute.TiledMma:
        return tiled_mma(self.config.tile_n, False, self.dtype, self.dtype)

    def pv(self) -> cute.TiledMma:
        return tiled_mma(self.dim_v, True, Float8E4M3FN, self.dtype)

    def begin_pv(self, state: State, slot: Int32) -> None:
        """P V of the transposed V tile in `slot`."""
        state.sums.begin(self.pv(), operand_a(state.p), state.v[None, None, None, slot])

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

    def softmax(self, job: Job, state: State, n: Int32, masked: bool, warpgroup: Int32) -> cute.Tensor:
        """The scores of KV block n become P in fp32; what O must be multiplied by for it."""
        self.scale_scores(state, n)
        s, at = rows_by_columns(state.s), coordinates(self.qk(), self.config.tile_n)
        first_key = n * self.config.tile_n
        state.shares[0].rules.apply(
            s,
            lambda r: row_of(self.config, job, warpgroup, at[r, 0][0]),
            Keys(first_key + at[0, 0][1], in_pairs=True),
            masked,
        )
        rescale, shifts = state.softmax.raise_max(s), state.softmax.shifts()
        self.lower(state.softmax, s, shifts)
        self.exponentials(state.softmax, s, shifts)
        return rescale

    def exponentials(self, softmax: OnlineSoftmax, s: cute.Tensor, shifts: cute.Tensor) -> None:
        """S becomes P, lifted, in place."""
        for r in range(cute.size(shifts)):
            for c in range(cute.size(s, mode=[1])):
                s[r, c] = exp2(cute.math.fma(s[r, c], softmax.scale_log2, LIFT - shifts[r]))

    def to_p(self, state: State, rescale: cute.Tensor) -> None:
        """P in 8 bits, as the next product's operand; what is multiplied joins the sum."""
        to_p(state.s, state.p)
        pin(state.p)
        row_sum = state.softmax.row_sum
        for r in range(cute.size(row_sum)):
            row_sum[r] = row_sum[r] * rescale[r]
        for r, number in rounded(state.p):
            row_sum[r] = row_sum[r] + number

    def take_over(self, state: State, turn: Int32, n: Int32, rescale: cute.Tensor) -> None:
        """Product `turn`, of block n, joins what is summed, which then follows the maximum."""
        state.sums.take_over(turn, self.scale_of_v(state, n), rescale)

    def finish(self, state: State, n: Int32) -> None:
        """The last product, of block n, joins O."""
        state.sums.finish(self.scale_of_v(state, n))

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
