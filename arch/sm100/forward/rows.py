"""The online softmax of whole rows, one to a thread, two elements to an instruction.

The maximum that exponents are taken from lags behind: it is raised only where a row's own has grown by more
than 2**THRESHOLD, because O in tensor memory must be multiplied whenever it is (FlashAttention-4, Zadouri et
al. 2026, "conditional rescaling"). P then is at most 2**THRESHOLD, and the sum, the log-sum-exp and the
output are those of the maximum that was used: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

import cutlass.cute as cute
from cutlass import Float32

from ...common.numeric import both, exp2_pair, in_span, packed
from ...common.softmax import OnlineSoftmax, exp2, finite
from ...elementwise import where
from ..tmem import registers

THRESHOLD = 8.0  # where P has 16 bits
PATTERN = 32  # elements after which the choice of exponential units repeats


def largest(s: cute.Tensor) -> Float32:
    """The maximum of a row (1, n), in four chains that the hardware takes three numbers at a time."""
    chains = [s[0, c] for c in range(4)]
    for c in range(4, cute.size(s)):
        chains[c % 4] = cute.arch.fmax(chains[c % 4], s[0, c])
    return cute.arch.fmax(cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3]))


def raise_max(softmax: OnlineSoftmax, most: Float32, threshold: float = THRESHOLD) -> Float32:
    """Take a block's maximum into the row's; the factor for what was accumulated before, mostly exactly 1."""
    before = softmax.row_max[0]
    now = cute.arch.fmax(before, most)
    power = (before - finite(now)) * softmax.scale_log2
    # Without a key so far it is -infinite: raised.
    stays = power >= -threshold
    softmax.row_max[0] = where(stays, before, now)
    return where(stays, 1.0, exp2(power))


def exponentials(softmax: OnlineSoftmax, s: cute.Tensor, shift: Float32, polynomial: int) -> None:
    """S (1, n), whose first column begins a pattern, becomes P in place.

    shift: what is taken off exponents. Of PATTERN elements `polynomial` are computed without ex2.
    """
    ops, scale = packed(), softmax.scale_log2
    for c in range(0, cute.size(s), 2):
        pair = s[0, c], s[0, c + 1]
        if _on_fma_units(c, polynomial):
            s[0, c], s[0, c + 1] = exp2_pair(pair, *in_span(scale, -shift), ops)
        else:
            x = ops.fma(pair, both(scale), both(-shift))
            s[0, c], s[0, c + 1] = exp2(x[0]), exp2(x[1])


def accumulate(softmax: OnlineSoftmax, p: cute.Tensor, rescale: Float32) -> None:
    """Take P (1, n) into the sum, which is multiplied by `rescale` first."""
    sums = sums_of(softmax, rescale)
    sums[2], sums[3] = p[0, 2], p[0, 3]
    take_in(sums, p, (0, *range(4, cute.size(p), 2)))
    add_up(softmax, sums)


def sums_of(softmax: OnlineSoftmax, rescale: Float32) -> cute.Tensor:
    """Two pairs of sums: a row's, multiplied by `rescale`, and zeros."""
    sums = registers(4)
    sums.fill(0.0)
    sums[0] = softmax.row_sum[0] * rescale
    return sums


def take_in(sums: cute.Tensor, p: cute.Tensor, columns: Iterable[int] | None = None) -> None:
    """P (1, n) joins the sums, its pairs in turn; `columns`: where those begin that do."""
    for c in range(0, cute.size(p), 2) if columns is None else columns:
        low = c % 4
        sums[low], sums[low + 1] = packed().add((sums[low], sums[low + 1]), (p[0, c], p[0, c + 1]))


def add_up(softmax: OnlineSoftmax, sums: cute.Tensor) -> None:
    """The sums are the row's."""
    low, high = packed().add((sums[0], sums[1]), (sums[2], sums[3]))
    softmax.row_sum[0] = low + high


def _on_fma_units(c: int, polynomial: int) -> bool:
    """Whether column c and the next are computed on the FMA units: spread evenly over the pattern."""
    pair, pairs = c % PATTERN // 2, PATTERN // 2
    return (pair + 1) * polynomial // 2 // pairs > pair * polynomial // 2 // pairs
