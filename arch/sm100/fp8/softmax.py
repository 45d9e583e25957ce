"""The softmax role in FP8: as for 16 bits, but for what 8 bits and scales need.

    S *= scale of K's block   rules   maximum   P = 2**LIFT exp2(S - max)   sum P   P *= scale of V's block

Scales of q, and of a whole head's k, are part of the softmax scale. V's cannot wait for the product, which
adds to O in tensor memory: O is in units of the largest scale so far, and P is multiplied by its block's part
of it; where a larger one comes, O is rescaled as for a new maximum, by the correction.

P, of 2**(LIFT + LAG) at most, uses what e4m3 holds. The sum is of P before it is rounded, as cuDNN's and
FlashAttention-4's: to read 8 bits back would take as many conversions again as to make them.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from ...common.output import OutputRows
from ...elementwise import maximum, minimum, where
from ..config import CHUNK
from ..forward.job import Work, row_of_thread
from ..forward.softmax import Row, Softmax
from ..tmem import registers, some_columns, times

LIFT = 4  # P is multiplied by 2**LIFT
LAG = 4  # the maximum that exponents are taken from is up to so much below the row's own
SMALLEST = 2.0**-126  # unit of an O that is 0


class Scales(NamedTuple):
    """Of a KV head. k, v: (blocks,), or what they are in one block of keys, for each block of scales in it.

    unit: (1,), of O: times what is in tensor memory. last: the last block of scales that has keys.
    first_key: where that block of keys begins.
    """

    k: cute.Tensor | tuple[Float32, ...] | None
    v: cute.Tensor | tuple[Float32, ...]
    unit: cute.Tensor
    last: Int32 | None = None
    first_key: Int32 | None = None


class QuantizedSoftmax(Softmax):
    """The same masks, waits and sums."""

    threshold = LAG

    def row(self, work: Work, tile: Int32) -> Row:
        """As for 16 bits, with scores and O in units of their scales."""
        row, job, block = super().row(work, tile), work.job, self.problem.block
        call, batch, unit = job.call, job.sequence.batch, cute.make_rmem_tensor(1, Float32)
        if block is None:
            place = batch, job.heads.kv
            unit[0] = call.v_scale[place]
            factor, scales = call.q_scale[place] * call.k_scale[place], Scales(None, (), unit)
        else:
            _, head = row_of_thread(self.config, job, tile)
            q = call.q_scale[batch, job.heads.known(self.config.heads, head), None]
            factor = q[minimum(row.number // block, q.shape[0] - 1)]
            unit[0] = Float32(SMALLEST)
            k, v = (x[batch, job.heads.kv, None] for x in (call.k_scale, call.v_scale))
            scales = Scales(k, v, unit, (job.sequence.seqlen_k - 1) // block)
        softmax, rules = row.softmax, row.rules
        if self.problem.score:
            rules = rules._replace(scale=rules.scale * factor)
        else:
            softmax = softmax._replace(scale_log2=softmax.scale_log2 * factor)
        return row._replace(softmax=softmax, rules=rules, scales=scales)

    def at_block(self, row: Row, first_key: Int32) -> Row:
        """The row with the scales of one block of keys, which are on their way while S is waited for."""
        block = self.problem.block
        if block is None:
            return row
        steps = range(0, self.config.tile_n, block)
        places = [minimum((first_key + c) // block, row.scales.last) for c in steps]
        k, v = (tuple(x[place] for place in places) for x in row.scales[:2])
        return row._replace(scales=row.scales._replace(k=k, v=v, first_key=first_key))

    def scale_scores(self, row: Row, scores: cute.Tensor, first_key: Int32) -> None:
        """S as if keys had not been divided by the scales of their blocks."""
        block, count = self.problem.block, cute.size(scores)
        for c in range(0, count, block) if block else ():
            part = some_columns(scores, c, min(block, count))
            times(part, self.of_columns(row, row.scales.k, first_key + c), part)

    def of_columns(self, row: Row, scales: tuple[Float32, ...], first_key: Int32) -> Float32:
        """The one, of those of a block of keys, that `first_key` and its neighbours have."""
        found = scales[0]
        for i, scale in enumerate(scales[1:], 1):
            found = where(first_key - row.scales.first_key < i * self.problem.block, found, scale)
        return found

    def of_output(self, row: Row, factor: Float32) -> Float32:
        """With what O's unit takes."""
        if self.problem.block is None:
            return factor
        unit, before = row.scales.unit, row.scales.unit[0]
        for scale in row.scales.v:
            unit[0] = maximum(unit[0], scale)
        return where(unit[0] == before, factor, factor * before * cute.arch.rcp_approx(unit[0]))

    def normaliser(self, row: Row, rows: OutputRows, exists: Boolean) -> Float32:
        """Of a sum without its lift and an O with it."""
        row.softmax.row_sum[0] = row.softmax.row_sum[0] * 2.0**-LIFT
        return super().normaliser(row, rows, exists) * (row.scales.unit[0] * 2.0**-LIFT)

    def to_p(
        self, row: Row, s: cute.Tensor, shift: Float32, column: Int32, first_key: Int32, masked: bool
    ) -> None:
        """With the lift."""
        super().to_p(row, s, shift - LIFT, column, first_key, masked)

    def rounded(self, row: Row, chunk: cute.Tensor, first_key: Int32) -> cute.Tensor:
        """With V's scales, which the sum is without."""
        if self.problem.block is not None:
            share = self.of_columns(row, row.scales.v, first_key) * cute.arch.rcp_approx(row.scales.unit[0])
            scaled = registers(CHUNK)
            times(chunk, share, scaled)
            chunk = scaled
        return super().rounded(row, chunk, first_key)
