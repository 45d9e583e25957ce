"""The online softmax: a running maximum and sum per row (Milakov and Gimelshein 2018, algorithm 3).

Scores come block by block. `raise_max` takes a block into the maximum and says by how much everything
accumulated before must be multiplied; `exponentials` turns the block's scores into P = exp(S - max),
unnormalised; `finish` gives the factor that normalises and the log-sum-exp. A row that has seen no key
has row_max -inf and row_sum 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32

from ..elementwise import where

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class OnlineSoftmax(NamedTuple):
    """Softmax state of one thread's rows.

    row_max: (rows,) fp32, as an exponent of two, the same in all lanes of a row.
    row_sum: (rows,) fp32, of this thread's columns only, until `finish` adds up the lanes.
    scale_log2: positive factor from scores to exponents of two.
    lanes: lane distances over which a row is spread: (1, 2) for 4 neighbours, () for one lane.
    """

    row_max: cute.Tensor
    row_sum: cute.Tensor
    scale_log2: Float32
    lanes: tuple[int, ...]

    @staticmethod
    def create(rows: int, scale_log2: Float32, lanes: tuple[int, ...]) -> OnlineSoftmax:
        """State of rows that have seen nothing."""
        row_max, row_sum = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return OnlineSoftmax(row_max, row_sum, scale_log2, lanes)

    def some_rows(self, first: int, count: int) -> OnlineSoftmax:
        """The state of `count` rows, from `first` on."""
        layout = cute.make_layout(count)
        parts = (cute.make_tensor(t.iterator + first, layout) for t in (self.row_max, self.row_sum))
        return OnlineSoftmax(*parts, self.scale_log2, self.lanes)

    def raise_max(self, s: cute.Tensor) -> cute.Tensor:
        """Take S (rows, columns) into the maximum; (rows,) factors for all that was accumulated before."""
        rescale = cute.make_rmem_tensor(cute.size(s, mode=[0]), Float32)
        for r in range(cute.size(rescale)):
            seen = s[r, 0]
            for c in range(1, cute.size(s, mode=[1])):
                seen = cute.arch.fmax(seen, s[r, c])
            for lane in self.lanes:
                seen = cute.arch.fmax(seen, cute.arch.shuffle_sync_bfly(seen, lane))
            before = self.row_max[r]
            self.row_max[r] = cute.arch.fmax(before, seen * self.scale_log2)
            # Exactly 1 where the maximum stays: both sides went through the same rounding.
            rescale[r] = exp2(before - finite(self.row_max[r]))
        return rescale

    def exponentials(self, s: cute.Tensor, rescale: cute.Tensor) -> None:
        """S becomes P in place and joins the sum."""
        for r in range(cute.size(rescale)):
            shift = finite(self.row_max[r])
            total = self.row_sum[r] * rescale[r]
            for c in range(cute.size(s, mode=[1])):
                s[r, c] = exp2(s[r, c] * self.scale_log2 - shift)
                total = total + s[r, c]
            self.row_sum[r] = total

    def finish(self, r: int, sink: Float32 | None) -> tuple[Float32, Float32]:
        """(factor that normalises row r's output, 0 where no key was seen; natural log-sum-exp).

        sink: a score that adds to the denominator only, or None.
        """
        total = self.row_sum[r]
        for lane in self.lanes:
            total = total + cute.arch.shuffle_sync_bfly(total, lane)
        top = self.row_max[r]
        if sink is not None:
            top = cute.arch.fmax(top, sink * LOG2_E)
        shift = finite(top)
        shrink = exp2(self.row_max[r] - shift)
        total = total * shrink
        if sink is not None:
            total = total + exp2(sink * LOG2_E - shift)
        factor = where(shrink == 0.0, 0.0, shrink * cute.arch.rcp_approx(total))
        return factor, (shift + cute.math.log2(total, fastmath=True)) * LN_2


def finite(row_max: Float32) -> Float32:
    """What to subtract from a row's exponents; 0 without a key, where -inf - -inf would be NaN."""
    return where(row_max == -Float32.inf, 0.0, row_max)


def exp2(x: Float32) -> Float32:
    """2**x: one ex2."""
    return cute.math.exp2(x, fastmath=True)
