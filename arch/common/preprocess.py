"""The backward pass's preprocess: D = rowsum(dO * O) - dLSE, LSE for exponents of two, sums and turns at 0.

A CTA takes SCRATCH_TILE scratch rows of one head. Neighbouring lanes share a row of dO and O, 16 bytes each
at a time, and add up among themselves. What special rows get: see `arch/backward.py`.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from ..backward import SCRATCH_TILE, PreprocessConfig, PreprocessOperands, PreprocessProblem, scratch_columns
from ..elementwise import where
from .rows import Rows, rows_of
from .schedule import OneTile
from .sequence import extent
from .softmax import LOG2_E, exp2

CHUNK = 8  # 16-bit numbers that a lane takes at a time
SUMS = 4  # fp32 numbers that a lane clears at a time


class PreprocessKernel:
    """The kernel for one problem: compiled with operands in their order and a stream."""

    def __init__(self, problem: PreprocessProblem, config: PreprocessConfig):
        self.problem, self.threads = problem, 32 * config.warps
        # A power of two, so that they lie in one warp, up to 32, which 256 columns take; and so many that a
        # step of the CTA takes no more rows than it has.
        columns = 1 << (problem.head_dim_v // CHUNK - 1).bit_length()
        self.lanes = max(columns, self.threads // SCRATCH_TILE)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)
        rows, batches = extent(call.out, call.cu_seqlens_q, call.max_seqlen_q)
        schedule = OneTile(cute.ceil_div(rows, SCRATCH_TILE), call.out.shape[-2], batches)
        self.kernel(call, schedule).launch(grid=schedule.grid(), block=(self.threads, 1, 1), stream=stream)

    def named(self, operands: list) -> PreprocessOperands:
        """The operands of a launch, in their order, by their names."""
        return PreprocessOperands(*operands)

    @cute.kernel
    def kernel(self, call: Any, schedule: OneTile):
        block, head, batch, _ = schedule.tile(cute.arch.block_idx()[0])
        rows = rows_of(call.cu_seqlens_q, call.out.shape[1], batch)
        first_row = block * SCRATCH_TILE
        if first_row < rows.count:
            used = rows.count
            if const_expr(self.problem.seqused_q):
                used = call.seqused_q[batch]
            self.clear(call.grad_q_sum, head, rows.scratch + first_row)
            per_step = self.threads // self.lanes
            mine = first_row + cute.arch.thread_idx()[0] // self.lanes
            for i in cutlass.range(SCRATCH_TILE // per_step, unroll=1):
                self.row(call, rows, head, mine + i * per_step, used)

    @cute.jit
    def clear(self, sums: cute.Tensor, head: Int32, first_row: Int32):
        """Zero the accumulator's rows from scratch row `first_row` on."""
        zeros = cute.make_rmem_tensor(SUMS, Float32)
        zeros.fill(0.0)
        count = SCRATCH_TILE * scratch_columns(self.problem.head_dim) // SUMS
        tile = cute.make_tensor(sums[head, first_row, None].iterator, cute.make_layout(count * SUMS))
        for i in cutlass.range(cute.arch.thread_idx()[0], count, self.threads, unroll=1):
            cute.autovec_copy(zeros, cute.local_tile(tile, (SUMS,), (i,)))

    @cute.jit
    def row(self, call: Any, rows: Rows, head: Int32, row: Int32, used: Int32):
        """One row; `lanes` neighbours work on it."""
        lane = cute.arch.thread_idx()[0] % self.lanes
        total, lse = Float32(0.0), Float32(Float32.inf)
        is_used = row < used
        if is_used:
            total = self.total(call, rows, head, row, lane)
            lse = rows.by_head(call.lse, head)[row]
            if const_expr(self.problem.grad_lse):
                total -= where(lane == 0, rows.by_head(call.grad_lse, head)[row], 0.0)
        for distance in range_constexpr(self.lanes.bit_length() - 1):
            total += cute.arch.shuffle_sync_bfly(total, 1 << distance)
        if lane == 0:
            place = rows.scratch + row
            call.delta[head, place] = self.shift(call, rows, head, total)
            lse_log2 = where(lse == -Float32.inf, 0.0, lse * LOG2_E)
            call.lse_log2[head, place] = self.exponent(lse_log2)
            if const_expr(self.problem.deterministic):
                call.turns_q[head, place] = Int32(0)
            if const_expr(self.problem.sink):
                self.sink(call, rows, head, row, -total * exp2(call.sink[head] * LOG2_E - lse_log2))

    @cute.jit
    def sink(self, call: Any, rows: Rows, head: Int32, row: Int32, gradient: Float32):
        """What one row adds to the sink's gradient."""
        if row < rows.count:
            rows.by_head(call.grad_sink_rows, head)[row] = gradient

    def total(self, call: PreprocessOperands, rows: Rows, head: Int32, row: Int32, lane: Int32) -> Float32:
        """One lane's part of rowsum(dO * O)."""
        return self.product(rows.of(call.out, head), rows.of(call.grad_out, head), row, lane)

    def shift(self, call: PreprocessOperands, rows: Rows, head: Int32, total: Float32) -> Float32:
        """D, as the main kernel takes it."""
        return total

    def exponent(self, lse_log2: Float32) -> Float32:
        """The log-sum-exp, as the main kernel takes it."""
        return lse_log2

    @cute.jit
    def product(self, out: cute.Tensor, grad_out: cute.Tensor, row: Int32, lane: Int32):
        """One lane's part of the sum over a row of O * dO."""
        total = Float32(0.0)
        if lane * CHUNK < self.problem.head_dim_v:
            mine = [cute.make_rmem_tensor(CHUNK, x.element_type) for x in (out, grad_out)]
            for registers, tensor in zip(mine, (out, grad_out), strict=True):
                cute.autovec_copy(cute.local_tile(tensor[row, None], (CHUNK,), (lane,)), registers)
            a, b = (registers.load().to(Float32) for registers in mine)
            for c in range_constexpr(CHUNK):
                total = cute.math.fma(a[c], b[c], total)
        return total
