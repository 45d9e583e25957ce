"""The combine kernel: out = sum over splits of exp(lse[split] - lse) * out[split], in fp32.

One warp takes one row of one query head: its lanes share out the splits to find lse, then the columns.
The largest lse is taken off the others first, which is exact for all that matter, however large they are.
A split that saw no key has lse -inf and weight 0, and its output is not read. A row without any key
becomes 0 with lse -inf, unless there is a sink, whose score is then the lse. Rows are counted through the
heads, as they lie in memory, so that neighbouring warps write neighbouring bytes.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from ..combine import CombineOperands, CombineProblem, Config
from ..elementwise import where
from .sequence import extent
from .softmax import LN_2, LOG2_E, exp2, finite

LANES, COLUMNS = 32, 4  # of a warp; that a lane takes at a time, 16 bytes in fp32


class CombineKernel:
    """The kernel for one problem: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: CombineProblem, config: Config):
        self.problem, self.config = problem, config
        # From a log-sum-exp to an exponent of two, and back.
        self.to_log2, self.from_log2 = (1.0, 1.0) if problem.log2 else (LOG2_E, LN_2)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = CombineOperands(*operands)
        rows, batches = extent(call.out, call.cu_seqlens_q, call.max_seqlen_q)
        blocks = cute.ceil_div(rows * call.out.shape[-2], self.config.warps)
        self.kernel(call, blocks).launch(
            grid=(blocks * batches, 1, 1), block=(LANES * self.config.warps, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, call: CombineOperands, blocks: Int32):
        block, heads = cute.arch.block_idx()[0], call.out.shape[-2]
        batch = Int32(Uint32(block) // Uint32(blocks))
        item = (block - batch * blocks) * self.config.warps + cute.arch.warp_idx()
        row = Int32(Uint32(item) // Uint32(heads))
        if cutlass.const_expr(self.problem.varlen):
            first = call.cu_seqlens_q[batch]
            rows = call.cu_seqlens_q[batch + 1] - first
        else:
            first, rows = Int32(0), call.out.shape[1]
        used = Boolean(True)
        if cutlass.const_expr(self.problem.seqused_q):
            used = row < call.seqused_q[batch]
        if row < rows:
            place = (first + row,) if cutlass.const_expr(self.problem.varlen) else (batch, row)
            self.combine(call, place, item - row * heads, used)

    @cute.jit
    def combine(self, call: CombineOperands, place: tuple, head: Int32, used: Boolean):
        """place: (row,) in packed or (batch, row) in dense operands. used: the row is in use."""
        lane = cute.arch.lane_idx()
        at = (*place[:-1], head, place[-1])
        parts = call.partial_lse[(None, *at)]
        sink = call.sink[head] if cutlass.const_expr(self.problem.sink) else None
        top, total = self.merge(parts, sink, lane)
        if cutlass.const_expr(self.problem.lse):
            # Rows out of use have seen no key; what makes them different is that the sink is not theirs.
            lse = where(used, top + cute.math.log2(total, fastmath=True) * self.from_log2, -Float32.inf)
            self.write_lse(call.lse, at, lse, lane == 0)
        share = cute.arch.rcp_approx(total)
        for start in cutlass.range_constexpr(0, self.problem.head_dim_v, LANES * COLUMNS):
            column = start + lane * COLUMNS
            if column < self.problem.head_dim_v:
                self.columns(call, (*place, head), parts, (top, share), column)

    @cute.jit
    def merge(self, parts: cute.Tensor, sink: Float32 | None, lane: Int32):
        """(largest lse, sum of all splits' exp(lse) relative to it), the same in all lanes."""
        top = Float32(-Float32.inf)
        for split in cutlass.range(lane, parts.shape[0], LANES, unroll=1):
            top = cute.arch.fmax(top, parts[split])
        top = cute.arch.warp_reduction_max(top)
        if cutlass.const_expr(sink is not None):
            top = cute.arch.fmax(top, sink)
        top = finite(top)
        total = Float32(0.0)
        for split in cutlass.range(lane, parts.shape[0], LANES, unroll=1):
            total += exp2((parts[split] - top) * self.to_log2)
        total = cute.arch.warp_reduction_sum(total)
        if cutlass.const_expr(sink is not None):
            total += exp2((sink - top) * self.to_log2)
        return top, total

    @cute.jit
    def write_lse(self, target: cute.Tensor, at: tuple, lse: Float32, due: Boolean):
        if due:
            target[at] = lse

    @cute.jit
    def columns(self, call: CombineOperands, place: tuple, parts: cute.Tensor, scale: tuple, column: Int32):
        """The output's columns `column` to `column + COLUMNS` of one row.

        scale: (largest lse, 1 over the sum of what is relative to it).
        """
        top, share = scale
        out = cute.make_rmem_tensor(COLUMNS, Float32)
        part = cute.make_rmem_tensor(COLUMNS, call.partial_out.element_type)
        out.fill(0.0)
        for split in cutlass.range(parts.shape[0], unroll=1):
            if parts[split] != -Float32.inf:
                weight = exp2((parts[split] - top) * self.to_log2) * share
                source = call.partial_out[(split, *place, None)]
                cute.autovec_copy(cute.local_tile(source, (COLUMNS,), (column // COLUMNS,)), part)
                for c in cutlass.range_constexpr(COLUMNS):
                    out[c] = cute.math.fma(weight, Float32(part[c]), out[c])
        rounded = cute.make_rmem_tensor(COLUMNS, call.out.element_type)
        rounded.store(out.load().to(rounded.element_type))
        target = call.out[(*place, None)]
        cute.autovec_copy(rounded, cute.local_tile(target, (COLUMNS,), (column // COLUMNS,)))
