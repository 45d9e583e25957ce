"""The online softmax: a running maximum and sum per row (Milakov and Gimelshein 2018, algorithm 3).

Scores come block by block. `raise_max` takes a block into the maximum and says by how much everything
accumulated before must be multiplied; `exponentials` turns the block's scores into P = exp(S - max),
unnormalised; `finish` gives the factor that normalises and the log-sum-exp. A row that has seen no key
has row_max -inf and row_sum 0.

An exponent of two is one fma: s * scale - shift, the shift the rounded max * scale. That rounding, which all
of a row's P have in common and the sum takes out again, is half a unit in the last place of the shift: beyond
LARGE it would show when P is rounded, and soon overflow. Where rows of a warp are as large, it takes their
maximum off before it scales (`lower`), which is exact for all scores that matter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Float32

from ..elementwise import absolute, where

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
LARGE = 4096.0  # shifts up to here are off by 2**-13 at most, and P by less than fp16 rounds it
EXTREME = 3e38  # exponents of two end here, which keeps what is computed from them finite


class OnlineSoftmax(NamedTuple):
    """Softmax state of one thread's rows.

    row_max: (rows,) fp32, a score, the same in all lanes of a row.
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
            self.row_max[r] = cute.arch.fmax(before, seen)
            # Exactly 1 where the maximum stays.
            rescale[r] = exp2((before - finite(self.row_max[r])) * self.scale_log2)
        return rescale

    def shifts(self) -> cute.Tensor:
        """(rows,): what is to be taken off each row's exponents of two, 0 without a key."""
        shifts = cute.make_rmem_tensor(cute.size(self.row_max), Float32)
        for r in range(cute.size(shifts)):
            shifts[r] = finite(self.row_max[r]) * self.scale_log2
        return shifts

    def lower(self, s: cute.Tensor, shifts: cute.Tensor) -> None:
        """Of rows whose shift is large, take the maximum off S instead, in place."""
        for r in range(cute.size(shifts)):
            most = where(is_large(shifts[r]), self.row_max[r], 0.0)
            shifts[r] = where(is_large(shifts[r]), 0.0, shifts[r])
            for c in range(cute.size(s, mode=[1])):
                s[r, c] = s[r, c] - most

    def exponentials(
        self, s: cute.Tensor, rescale: cute.Tensor, shifts: cute.Tensor, columns: range | None = None
    ) -> None:
        """S becomes P in place and joins the sum; S and shifts as `lower` leaves them where any is large.

        columns: only these for now, the first before all others; None: all.
        """
        for r in range(cute.size(rescale)):
            total = self.row_sum[r]
            for c in columns or range(cute.size(s, mode=[1])):
                s[r, c] = exp2(cute.math.fma(s[r, c], self.scale_log2, -shifts[r]))
                total = total + s[r, c] if c else cute.math.fma(total, rescale[r], s[r, c])
            self.row_sum[r] = total

    def exponent(self, r: int) -> Float32:
        """Row r's maximum as an exponent of two, -inf without a key."""
        inside = cute.arch.fmax(cute.arch.fmin(self.row_max[r] * self.scale_log2, EXTREME), -EXTREME)
        return where(self.row_max[r] == -Float32.inf, -Float32.inf, inside)

    def finish(self, r: int, sink: Float32 | None) -> tuple[Float32, Float32]:
        """(factor that normalises row r's output, 0 where no key was seen; natural log-sum-exp).

        sink: a score that adds to the denominator only, or None.
        """
        total = self.row_sum[r]
        for lane in self.lanes:
            total = total + cute.arch.shuffle_sync_bfly(total, lane)
        own = top = self.exponent(r)
        if sink is not None:
            sink = cute.arch.fmin(sink * LOG2_E, EXTREME)
            top = cute.arch.fmax(top, sink)
        shift = finite(top)
        shrink = exp2(own - shift)
        total = total * shrink
        if sink is not None:
            total = total + exp2(sink - shift)
        factor = where(total == 0.0, 0.0, shrink * cute.arch.rcp_approx(total))
        return factor, (shift + cute.math.log2(total, fastmath=True)) * LN_2


def finite(row_max: Float32) -> Float32:
    """What to subtract from a row's scores or exponents; 0 without a key, where -inf - -inf would be NaN."""
    return where(row_max == -Float32.inf, 0.0, row_max)


def is_large(shift: Float32) -> Boolean:
    """Whether a shift is too large to be taken off by one fma."""
    return absolute(shift) >= LARGE


def exp2(x: Float32) -> Float32:
    """2**x: one ex2."""
    return cute.math.exp2(x, fastmath=True)
