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
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common.blocks import Listed, Range
from ...common.element import element_type
from ...common.key_block import KeyBlock, Launch
from ...common.operand import transposed
from ...common.order import compute_before_wait, hidden_zero, unknown
from ...common.rules import Rules
from ...problem import Problem
from ..edge import Edge
from ..mma import accumulator, begin, begin_sum, operand_a, tiled_mma, to_shared, visible, wait
from .config import ROWS, THREADS, Tiling
from .elements import Transposed, Visit, Weighing
from .job import Edges, GradientOperands, Sums, Tiles, key_block
from .store import Result
from .turns import AsTheyCome, InTurns

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


class Scores(NamedTuple):
    """What a thread has of a visit's scores, from P on.

    weights: what dP - D is multiplied by. dp: of a product that was begun. p, ds: operands, P by now. delta:
    D of the rows. q, out: the slots of Q and of dO. keep_scale: of dropout.
    """

    weights: cute.Tensor
    dp: cute.Tensor
    p: cute.Tensor
    ds: cute.Tensor
    delta: cute.Tensor
    q: Any
    out: Any
    keep_scale: Any


class Compute:
    """What both ways to share out the work have, and the one with 64 keys for each warpgroup."""

    results = Result

    def __init__(
        self,
        problem: Problem,
        config: Tiling,
        operands: GradientOperands,
        turns: AsTheyCome | InTurns,
    ):
        self.problem, self.config = problem, config
        self.result = self.results(problem, config, operands, turns)
        self.dtype = element_type(problem.precision)

    @property
    def weights_are_p(self) -> bool:
        """Whether dS is a multiple of P itself, and P^T as an operand all of it."""
        return self.problem.score is None and not self.problem.dropout

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, ends: ComputeEnds, edges: Edges, warp_index: Int32):
        block = key_block(self.problem, self.config, launch)
        if block.any():
            self.key_block(block, launch, tiles, ends, edges, warp_index // 4)

    @cute.jit
    def key_block(
        self, block: KeyBlock, launch: Launch, tiles: Tiles, ends: ComputeEnds, edges: Edges, warpgroup: Int32
    ):
        rules = self.rules(block)
        visits = block.visits(self.problem, self.config, rules)
        sums = self.sums()
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
                s, dp = self.score_accumulator(), self.score_accumulator()
                p_operand, ds_operand = self.weights(s)
                q = ends.q.wait_and_advance()
                self.begin_s(s, visit, q)
                out = ends.grad_out.wait_and_advance()
                if cutlass.const_expr(self.config.overlap):
                    self.begin_dp(dp, visit, out)
                wait(int(self.config.overlap), s)
                lse, delta = tiles.lse[None, q.index], tiles.delta[None, out.index]
                self.elements().probabilities(visit, s, p_operand, lse, masked)
                if cutlass.const_expr(self.weights_are_p):
                    compute_before_wait(*halves_joined(s))
                if cutlass.const_expr(not self.config.overlap):
                    self.begin_dp(dp, visit, out)
                scores = Scores(s, dp, p_operand, ds_operand, delta, q, out, block.call.keep_scale)
                self.gradients(visit, scores, sums, tiles, edges)
        if cutlass.const_expr(not self.problem.gqa):
            self.all_meet()  # dK and dV take the places of K and V
        # Found once more, so that no register holds through the products what only the end needs.
        block = key_block(self.problem, self.config, launch, unknown(Int32(0)))
        self.result.store(block, tiles, sums, visits, warpgroup)

    def gradients(self, visit: Visit, scores: Scores, sums: Sums, tiles: Tiles, edges: Edges) -> None:
        """What a visit adds to dV, dK and dQ, from P on."""
        wait(0, scores.dp)
        self.differentiate(visit, scores)
        self.begin_grad_kv(sums.v, scores.p, visit.operands.grad_out_as_b, scores.out)
        self.share(visit, scores.ds, tiles.ds)
        acc_q = accumulator(self.config.part_columns)
        self.begin_q(acc_q, visit)
        wait(1, sums.v)
        scores.out.release()
        self.begin_grad_kv(sums.k, scores.ds, visit.operands.q_as_b, scores.q)
        wait(1, acc_q)
        self.hand_over(visit, acc_q, tiles.grad_q, edges.grad_q, visit.turn)
        wait(0, sums.k)
        scores.q.release()

    def differentiate(self, visit: Visit, scores: Scores) -> None:
        """dP becomes dS, an operand."""
        self.elements().drop(scores.dp, scores.p, scores.keep_scale)
        self.elements().differentiate(
            visit, scores.dp, scores.weights, scores.p, scores.ds, scores.delta
        )

    def sums(self) -> Sums:
        """Registers of one thread for dK and dV."""
        return Sums(accumulator(self.config.columns), accumulator(self.config.columns_v))

    def score_accumulator(self) -> cute.Tensor:
        """Registers of one thread for S^T or dP^T."""
        return accumulator(self.config.tile_m)

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
            first_key=block.first_key + warpgroup * self.config.keys,
            operands=self.descriptors(tiles, warpgroup),
            weighing=self.weighing(block, rules),
        )

    def rules(self, block: KeyBlock) -> Rules:
        """Of the block's head."""
        return Rules.of(self.problem, block.call, block.sequence, block.head)

    def weighing(self, block: KeyBlock, rules: Rules) -> Weighing:
        """How its scores become probabilities."""
        return Weighing.of(self.problem, block, rules)

    def descriptors(self, tiles: Tiles, warpgroup: Int32) -> Descriptors:
        config, moved = self.config, tiles.moved
        scores, grad_q = self.scores(), self.grad_q()
        grad_k, grad_v = self.grad_kv(config.columns), self.grad_kv(config.columns_v)
        # 64 rows of dQ: the warpgroup's of its rows and all columns, or the other way round.
        rows, columns = (warpgroup, 0) if config.rows_apart else (0, warpgroup)

        def own(tile: cute.Tensor, size: int, part: Int32) -> cute.Tensor:
            """The warpgroup's columns of a tile, as rows."""
            return cute.local_tile(transposed(tile), (size, ROWS, cute.size(tile, mode=[2])), (part, 0, 0))

        ds, k = own(tiles.ds, ROWS, rows), own(moved.k, config.part_columns, columns)
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

    def elements(self) -> Transposed:
        """What happens to scores."""
        overlaps = self.config.overlap
        return Transposed(self.problem, self.scores(), self.config.tile_m, self.weights_are_p, not overlaps)

    def grad_kv(self, columns: int) -> cute.TiledMma:
        """Of dK and dV: 64 keys x columns."""
        return tiled_mma(self.dtype, columns, a_in_registers=True, b_transposed=True)

    def grad_q(self) -> cute.TiledMma:
        """Of a warpgroup's part of dQ, 64 rows of its columns; dS lies with its rows contiguous."""
        columns = self.config.part_columns
        return tiled_mma(self.dtype, columns, a_in_registers=False, b_transposed=True, a_transposed=True)

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
        return visit.turn % self.config.ds_stages * self.config.warpgroups

    def steps(self, dim: int) -> int:
        """Of a product over a head dim."""
        precision = self.problem.precision
        return precision.padded(dim) // precision.k_step

    def weights(self, acc: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        """Registers for P and dS as the next products take them: half as many each as an accumulator."""
        p, ds = (cute.make_rmem_tensor(acc.layout, self.dtype) for _ in range(2))
        return p, ds

    def share(self, visit: Visit, ds: cute.Tensor, tiles: cute.Tensor) -> None:
        """dS^T of this warpgroup's keys to shared memory; behind it is that of all warpgroups."""
        tile = tiles[None, None, self.ds_stage(visit) + visit.warpgroup]
        to_shared(self.scores(), ds, tile, visit.thread)
        visible()
        self.all_meet()

    def all_meet(self) -> None:
        """A barrier of all compute warpgroups."""
        cute.arch.barrier(barrier_id=DS, number_of_threads=THREADS * self.config.warpgroups)

    def hand_over(
        self, visit: Visit, acc_q: cute.Tensor, numbers: cute.Tensor, edge: Edge, nth: Int32
    ) -> None:
        """Columns of dQ to the store role, the nth of as many: handed_columns at a time.

        Number e of thread t lies at e * THREADS + t.
        """
        edge, size = edge.of(visit.warpgroup), self.config.handed_columns // 2
        hands = cute.size(acc_q) // size
        for h in range(hands):
            edge.wait_empty(nth * hands + h)
            for e in range(size):
                numbers[e * THREADS + visit.thread, visit.warpgroup] = acc_q[h * size + e]
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
