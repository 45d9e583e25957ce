"""The online softmax of whole rows, one to a thread, two elements to an instruction.

The maximum that exponents are taken from lags behind: it is raised only where a row's own has grown by more
than 2**THRESHOLD, because O in tensor memory must be multiplied whenever it is (FlashAttention-4, Zadouri et
al. 2026, "conditional rescaling"). P then is at most 2**THRESHOLD, and the sum, the log-sum-exp and the
output are those of the maximum that was used: nothing is lost.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32

from ...common.numeric import both, exp2_pair, in_span, packed
from ...common.softmax import OnlineSoftmax, exp2, finite
from ...elementwise import where

THRESHOLD = 8.0
PATTERN = 32  # elements after which the choice of exponential units repeats


def largest(s: cute.Tensor) -> Float32:
    """The maximum of a row (1, n), in four chains that the hardware takes three numbers at a time."""
    chains = [s[0, c] for c in range(4)]
    for c in range(4, cute.size(s)):
        chains[c % 4] = cute.arch.fmax(chains[c % 4], s[0, c])
    return cute.arch.fmax(cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3]))


def raise_max(softmax: OnlineSoftmax, most: Float32) -> Float32:
    """Take a block's maximum into the row's; the factor for what was accumulated before, mostly exactly 1."""
    before = softmax.row_max[0]
    now = cute.arch.fmax(before, most * softmax.scale_log2)
    # Without a key so far `now - before` is infinite or NaN: raised.
    stays = now - before <= THRESHOLD
    softmax.row_max[0] = where(stays, before, now)
    return where(stays, 1.0, exp2(before - finite(now)))


def exponentials(softmax: OnlineSoftmax, s: cute.Tensor, columns: range, polynomial: int) -> None:
    """S becomes P in place on some columns; of PATTERN elements `polynomial` are computed without ex2."""
    ops, scale, shift = packed(), softmax.scale_log2, -finite(softmax.row_max[0])
    for c in columns[::2]:
        pair = s[0, c], s[0, c + 1]
        if _on_fma_units(c, polynomial):
            s[0, c], s[0, c + 1] = exp2_pair(pair, *in_span(scale, shift), ops)
        else:
            x = ops.fma(pair, both(scale), both(shift))
            s[0, c], s[0, c + 1] = exp2(x[0]), exp2(x[1])


def accumulate(softmax: OnlineSoftmax, p: cute.Tensor, rescale: Float32) -> None:
    """Take P (1, n) into the sum, which is multiplied by `rescale` first."""
    ops = packed()
    sums = [(softmax.row_sum[0] * rescale, Float32(0.0)), (p[0, 0], p[0, 1])]
    for c in range(2, cute.size(p), 2):
        sums[c // 2 % 2] = ops.add(sums[c // 2 % 2], (p[0, c], p[0, c + 1]))
    low, high = ops.add(*sums)
    softmax.row_sum[0] = low + high


def _on_fma_units(c: int, polynomial: int) -> bool:
    """Whether column c and the next are computed on the FMA units: spread evenly over the pattern."""
    pair, pairs = c % PATTERN // 2, PATTERN // 2
    return (pair + 1) * polynomial // 2 // pairs > pair * polynomial // 2 // pairs
