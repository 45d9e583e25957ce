"""The compute role: each warpgroup has 64 keys, dK and dV of them in registers, and takes all query tiles.

    S^T = K Q^T and dP^T = V dO^T begun    wait S     P = exp(S - LSE)      wait dP    dS = P (dP - D)
    dV += P^T dO begun     dS to shared, for all      dQ = dS K begun       wait dV    dK += dS^T Q begun
    wait dQ    dQ to shared, for the store role       wait dK

Scores lie transposed, so that P^T and dS^T are operands where they are, in registers: only dQ, which sums
over the keys of all warpgroups, takes dS from shared memory. With two places for dS its barrier is the only
one of a visit: who passes it knows that all have read the dS before.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, pipeline

from ...common.blocks import Listed, Range
from ...common.dropout import Dropout
from ...common.element import element_type
from ...common.operand import transposed
from ...common.order import compute_before_wait, depend_on_load, hidden_zero, pin, unknown
from ...common.rules import Rules
from ...common.softmax import LOG2_E, exp2
from ...elementwise import where
from ...problem import Problem
from ..mma import accumulator, begin, begin_sum, coordinates, operand_a, tiled_mma, to_shared, wait
from .edge import Edge
from .job import KeyBlock, Launch, Sums, Tiles
from .store import Result
from .tuning import DS_STAGES, ROWS, THREADS, Config

SIGNS = 0x8000, 0x80000000  # of a register's two numbers of 16 bits
DS = 1  # the named barrier of all compute warpgroups


class ComputeEnds(NamedTuple):
    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer
    q: pipeline.PipelineConsumer
    grad_out: pipeline.PipelineConsumer


class Descriptors(NamedTuple):
    """Operands (mma, rows or columns, k[, tiles]) of a warpgroup's products.

    k, q: of S^T = K Q^T; v, grad_out: of dP^T = V dO^T; grad_out_as_b, q_as_b: of dV and dK, whose other
    operands are in registers; ds, k_as_b: of dQ.
    """

    k: cute.Tensor
    q: cute.Tensor
    v: cute.Tensor
    grad_out: cute.Tensor
    grad_out_as_b: cute.Tensor
    q_as_b: cute.Tensor
    ds: cute.Tensor
    k_as_b: cute.Tensor


class Weighing(NamedTuple):
    """How scores become probabilities, of one query head."""

    rules: Rules
    dropout: Dropout | None
    scale_log2: Float32


class Visit(NamedTuple):
    """What a thread works on now. All of it is found anew at every visit: see `hidden_zero`.

    first_row, first_key: of the tile's rows, and of the warpgroup's keys. turn: visits before this one.
    """

    warpgroup: Int32
    thread: Int32  # of the warpgroup
    turn: Int32
    first_row: Int32
    first_key: Int32
    operands: Descriptors
    weighing: Weighing


class Compute:
    """result: where dK and dV go."""

    def __init__(self, problem: Problem, config: Config, result: Result):
        self.problem, self.config, self.result = problem, config, result
        self.dtype = element_type(problem.precision)
        # dS is a multiple of P itself, and P^T as an operand all of it.
        self.weights_are_p = problem.score is None and not problem.dropout

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, ends: ComputeEnds, edge: Edge, warp_index: Int32):
        block = KeyBlock.of(self.problem, self.config, launch)
        if block.first_key < block.sequence.k_rows:
            self.key_block(block, launch, tiles, ends, edge, warp_index // 4)

    @cute.jit
    def key_block(
        self, block: KeyBlock, launch: Launch, tiles: Tiles, ends: ComputeEnds, edge: Edge, warpgroup: Int32
    ):
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        sums = Sums(accumulator(self.config.columns), accumulator(self.config.columns_v))
        for acc in sums:
            acc.fill(0.0)
        if visits.any():
            ends.k.wait_and_advance()
            ends.v.wait_and_advance()
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            masked = phases[p].masked
            for i in cutlass.range(phases[p].visits, unroll=1):
                visit = self.visit(block, rules, tiles, visits, visits.nth(phases[p], i), warpgroup)
                s, dp = accumulator(self.config.tile_m), accumulator(self.config.tile_m)
                p_operand, ds_operand = self.operand(s), self.operand(dp)
                q = ends.q.wait_and_advance()
                self.begin_s(s, visit, q)
                out = ends.grad_out.wait_and_advance()
                if cutlass.const_expr(self.config.overlap):
                    self.begin_dp(dp, visit, out)
                wait(int(self.config.overlap), s)
                lse, delta = tiles.lse[None, q.index], tiles.delta[None, out.index]
                self.probabilities(visit, s, p_operand, lse, masked)
                if cutlass.const_expr(self.weights_are_p):
                    compute_before_wait(*halves_joined(s))
                if cutlass.const_expr(not self.config.overlap):
                    self.begin_dp(dp, visit, out)
                wait(0, dp)
                self.drop(dp, p_operand, block.call.keep_scale)
                self.differentiate(visit, dp, s, p_operand, ds_operand, delta)
                self.begin_grad_kv(sums.v, p_operand, visit.operands.grad_out_as_b, out)
                self.share(visit, ds_operand, tiles.ds)
                acc_q = accumulator(ROWS)
                self.begin_q(acc_q, visit)
                wait(1, sums.v)
                out.release()
                self.begin_grad_kv(sums.k, ds_operand, visit.operands.q_as_b, q)
                wait(1, acc_q)
                self.hand_over(visit, acc_q, tiles.grad_q, edge)
                wait(0, sums.k)
                q.release()
        self.all_meet()
        # Found once more, so that no register holds through the products what only the end needs.
        block = KeyBlock.of(self.problem, self.config, launch, unknown(Int32(0)))
        self.result.store(block, tiles, sums, visits, warpgroup)

    def weighing(self, block: KeyBlock, rules: Rules) -> Weighing:
        dropout = Dropout.of(self.problem, block.call, block.sequence, block.head)
        # A score rule takes scaled scores, so that only the change of base is left.
        scale = 1.0 if self.problem.score else block.call.softmax_scale
        return Weighing(rules, dropout, Float32(scale * LOG2_E))

    def visit(
        self, block: KeyBlock, rules: Rules, tiles: Tiles, visits: Range | Listed, place: Int32,
        warpgroup: Int32,
    ) -> Visit:
        zero = hidden_zero(Int32(place))
        warpgroup += zero
        return Visit(
            warpgroup=warpgroup,
            thread=cute.arch.thread_idx()[0] % THREADS + zero,
            turn=Int32(visits.turn(place)),
            first_row=Int32(visits.block(place)) * self.config.tile_m,
            first_key=block.first_key + warpgroup * ROWS,
            operands=self.descriptors(tiles, warpgroup),
            weighing=self.weighing(block, rules),
        )

    def descriptors(self, tiles: Tiles, warpgroup: Int32) -> Descriptors:
        config, moved = self.config, tiles.moved
        scores, grad_q = self.scores(), self.grad_q()
        grad_k, grad_v = self.grad_kv(config.columns), self.grad_kv(config.columns_v)
        # 64 rows and 64 columns of dQ: the warpgroup's of its rows and all columns, or the other way round.
        rows, columns = (warpgroup, 0) if config.rows_apart else (0, warpgroup)
        ds, k = (
            cute.local_tile(transposed(tile), (ROWS, ROWS, cute.size(tile, mode=[2])), (part, 0, 0))
            for tile, part in ((tiles.ds, rows), (moved.k, columns))
        )
        return Descriptors(
            k=as_a(scores, moved.k[None, None, warpgroup]),
            q=as_b(scores, moved.q),
            v=as_a(scores, moved.v[None, None, warpgroup]),
            grad_out=as_b(scores, moved.grad_out),
            grad_out_as_b=as_b(grad_v, transposed(moved.grad_out)),
            q_as_b=as_b(grad_k, transposed(moved.q)),
            ds=as_a(grad_q, ds),
            k_as_b=as_b(grad_q, k),
        )

    def scores(self) -> cute.TiledMma:
        """Of S^T and dP^T: 64 keys x tile_m."""
        return tiled_mma(self.dtype, self.config.tile_m, a_in_registers=False, b_transposed=False)

    def grad_kv(self, columns: int) -> cute.TiledMma:
        """Of dK and dV: 64 keys x columns."""
        return tiled_mma(self.dtype, columns, a_in_registers=True, b_transposed=True)

    def grad_q(self) -> cute.TiledMma:
        """Of a warpgroup's part of dQ, 64 x 64; dS lies with its rows contiguous."""
        return tiled_mma(self.dtype, ROWS, a_in_registers=False, b_transposed=True, a_transposed=True)

    def begin_s(self, s: cute.Tensor, visit: Visit, q) -> None:
        """S^T = K Q^T, of the tile in slot `q`; columns that are no more than padding are left out."""
        pair = visit.operands.k, visit.operands.q[None, None, None, q.index]
        begin_sum(self.scores(), s, [pair], self.steps(self.problem.head_dim))

    def begin_dp(self, dp: cute.Tensor, visit: Visit, out) -> None:
        """dP^T = V dO^T, likewise."""
        pair = visit.operands.v, visit.operands.grad_out[None, None, None, out.index]
        begin_sum(self.scores(), dp, [pair], self.steps(self.problem.head_dim_v))

    def begin_grad_kv(self, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, slot) -> None:
        """dV += P^T dO or dK += dS^T Q, of the tile in `slot`."""
        columns = 2 * cute.size(acc)
        begin(self.grad_kv(columns), acc, operand_a(a), b[None, None, None, slot.index], accumulate=True)

    def begin_q(self, acc: cute.Tensor, visit: Visit) -> None:
        """The warpgroup's part of dQ = dS K, over the keys of all warpgroups."""
        ds, k, stage = visit.operands.ds, visit.operands.k_as_b, self.ds_stage(visit)
        pairs = [
            (ds[None, None, None, stage + w], k[None, None, None, w]) for w in range(self.config.warpgroups)
        ]
        begin_sum(self.grad_q(), acc, pairs, self.steps(ROWS))

    def ds_stage(self, visit: Visit) -> Int32:
        """The first tile of dS of a visit."""
        return visit.turn % DS_STAGES * self.config.warpgroups

    def steps(self, dim: int) -> int:
        """Of a product over a head dim."""
        precision = self.problem.precision
        return precision.padded(dim) // precision.k_step

    def probabilities(
        self, visit: Visit, s: cute.Tensor, p_operand: cute.Tensor, lse: cute.Tensor, masked: bool
    ) -> None:
        """S^T becomes, in place, what dP - D is multiplied by: P^T, times the slope of the score rule.

        Then P^T itself is kept as an operand. A slope that is no number, of a pair that is hidden or has no
        weight, counts for nothing. Each octet of rows is brought to its end before the next, so that what
        lies between takes few registers.
        """
        at, weighing = coordinates(self.scores(), self.config.tile_m, visit.thread), visit.weighing
        first_row = visit.first_row
        for i, exponents in self.by_octet(visit, lse):
            p = octet(s, i)
            slopes = weighing.rules.apply_with_slopes(
                p,
                lambda r, first=first_row, i=i: first + at[0, 2 * i + r][1],
                lambda c: visit.first_key + at[c, 0][0],
                masked,
            )
            for r in range(2):
                for c in range(2):
                    p[r, c] = exp2(cute.math.fma(p[r, c], weighing.scale_log2, -exponents[r]))
            if self.weights_are_p:
                continue
            row, key = first_row + at[0, 2 * i][1], visit.first_key + at[0, 0][0]
            kept = self.kept(p, weighing.dropout, row, key, visit.thread)
            self.round(kept, p_operand, i)
            if not self.config.overlap:
                # Where registers are scarce nothing of the next octet is worked out meanwhile.
                first_row = depend_on_load(p[1, 1], first_row)
            if self.problem.score is None:
                continue
            for r in range(2):
                for c in range(2):
                    slope = slopes if isinstance(slopes, float) else slopes[r, c]
                    p[r, c] = where(p[r, c] == 0.0, 0.0, p[r, c] * slope)

    def kept(
        self, p: cute.Tensor, dropout: Dropout | None, row: Int32, key: Int32, thread: Int32
    ) -> cute.Tensor:
        """An octet of P with -0 where dropout removes it; `drop` knows it by that. row, key: its first."""
        if dropout is None:
            return p
        kept, keeps = cute.make_rmem_tensor(p.layout, Float32), dropout.keeps(row, key, thread)
        for r in range(2):
            for c in range(2):
                kept[r, c] = where(keeps[r][c], p[r, c], -0.0)
        return kept

    def drop(self, dp: cute.Tensor, p_operand: cute.Tensor, keep_scale: Float32 | None) -> None:
        """What dropout does to dP: 0 where it left -0 of P."""
        if self.problem.dropout:
            pairs = cute.recast_tensor(p_operand, Uint32)
            for e in range(cute.size(dp)):
                is_dropped = (pairs[e // 2] & SIGNS[e % 2]) != 0
                dp[e] = where(is_dropped, 0.0, dp[e] * keep_scale)

    def differentiate(
        self, visit: Visit, dp: cute.Tensor, weights: cute.Tensor, p_operand: cute.Tensor,
        ds_operand: cute.Tensor, delta: cute.Tensor,
    ) -> None:
        """dS^T = weights * (dP - D) as an operand; and P^T, where the weights are P^T."""
        for i, shifts in self.by_octet(visit, delta):
            ds, weight = octet(dp, i), octet(weights, i)
            if self.weights_are_p:
                self.round(weight, p_operand, i)
            for r in range(2):
                for c in range(2):
                    ds[r, c] = weight[r, c] * (ds[r, c] - shifts[r])
            self.round(ds, ds_operand, i)

    def round(self, numbers: cute.Tensor, operand: cute.Tensor, i: int) -> None:
        """An octet's numbers into an operand, two in a register from here on."""
        octet(operand, i).store(numbers.load().to(self.dtype))
        pin(cute.make_tensor(operand.iterator + 4 * i, cute.make_layout(4)))

    def operand(self, acc: cute.Tensor) -> cute.Tensor:
        """Registers for an accumulator as the next product takes it: half as many."""
        return cute.make_rmem_tensor(acc.layout, self.dtype)

    def by_octet(self, visit: Visit, numbers: cute.Tensor) -> Iterator[tuple[int, cute.Tensor]]:
        """Octets of rows, and LSE or D of the two that a thread has, read when their turn comes."""
        lane = visit.thread % 4
        for i in range(self.config.tile_m // 8):
            pair = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(cute.local_tile(numbers, (2,), (4 * i + lane,)), pair)
            yield i, pair

    def share(self, visit: Visit, ds: cute.Tensor, tiles: cute.Tensor) -> None:
        """dS^T of this warpgroup's keys to shared memory; behind it is that of all warpgroups."""
        tile = tiles[None, None, self.ds_stage(visit) + visit.warpgroup]
        to_shared(self.scores(), ds, tile, visit.thread)
        self.all_meet()

    def all_meet(self) -> None:
        """A barrier of all compute warpgroups."""
        cute.arch.barrier(barrier_id=DS, number_of_threads=THREADS * self.config.warpgroups)

    def hand_over(self, visit: Visit, acc_q: cute.Tensor, numbers: cute.Tensor, edge: Edge) -> None:
        """A warpgroup's part of dQ to the store role, number e of thread t at e * THREADS + t."""
        edge = edge.of(visit.warpgroup)
        edge.wait_empty(visit.turn)
        for e in range(cute.size(acc_q)):
            numbers[e * THREADS + visit.thread, visit.warpgroup] = acc_q[e]
        edge.warp_filled()


def as_a(mma: cute.TiledMma, tile: cute.Tensor) -> cute.Tensor:
    """A tile (rows, k) in shared memory as an operand."""
    return mma.make_fragment_A(mma.get_slice(0).partition_A(tile))


def as_b(mma: cute.TiledMma, tile: cute.Tensor) -> cute.Tensor:
    """A tile (columns, k) in shared memory as an operand."""
    return mma.make_fragment_B(mma.get_slice(0).partition_B(tile))


def halves_joined(p: cute.Tensor) -> list[Float32]:
    """Two numbers that depend on all of P, and are not negative since no probability is: its halves' bits."""
    words, count = cute.recast_tensor(p, Int32), cute.size(p)
    joined = cute.make_rmem_tensor(2, Int32)
    for i in range(2):
        half = [words[i * count // 2 + e] for e in range(count // 2)]
        joined[i] = functools.reduce(operator.or_, half)
    both = cute.recast_tensor(joined, Float32)
    return [both[0], both[1]]


def octet(acc: cute.Tensor, i: int) -> cute.Tensor:
    """A thread's part of eight neighbouring rows of transposed scores: two rows x its two keys."""
    return cute.make_tensor(acc.iterator + 4 * i, cute.make_layout((2, 2), stride=(1, 2)))
