"""Floats of eight bits and fewer: what each bit pattern stands for, and rounding to them.

e4m3 has no infinity and one NaN per sign; e5m2 is IEEE-like; e2m3, e3m2 and e2m1 have finite numbers only
(OCP Microscaling Formats). The scales ue8m0 (powers of two) and ue4m3 (e4m3 without its sign) take a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Narrow:
    """A format with a sign bit. exponent, mantissa: their bits; bias: of the exponent.

    nans: how many of the largest patterns of either sign are NaN. infinity: whether the one below them is.
    """

    exponent: int
    mantissa: int
    bias: int
    nans: int = 0
    infinity: bool = False

    @property
    def bits(self) -> int:
        """Bits of a number, its sign included."""
        return 1 + self.exponent + self.mantissa

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """float64 values of the patterns without a sign, from 0 up."""
        pattern = np.arange(1 << self.bits - 1)
        field, fraction = pattern >> self.mantissa, pattern & (1 << self.mantissa) - 1
        whole = np.where(field > 0, fraction + (1 << self.mantissa), fraction).astype(np.float64)
        values = np.ldexp(whole, np.maximum(field, 1) - self.bias - self.mantissa)
        if self.nans:
            values[-self.nans :] = np.nan
        if self.infinity:
            values[-self.nans - 1] = np.inf
        return values

    @cached_property
    def table(self) -> np.ndarray:
        """float32 value of each byte; the bits above the number's own must be 0: other bytes are NaN."""
        values = np.full(256, np.nan, np.float32)
        values[: 1 << self.bits] = np.concatenate([self.magnitudes, -self.magnitudes])
        return values

    @cached_property
    def finite(self) -> np.ndarray:
        """The finite magnitudes, from 0 to the largest."""
        return self.magnitudes[: len(self.magnitudes) - self.nans - int(self.infinity)]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float64 -> bytes, to nearest even; beyond the largest number that number (.satfinite).

        NaN becomes the largest pattern: NaN where the format has one, else the largest number.
        """
        size = np.abs(values)
        ties = (self.finite[1:] + self.finite[:-1]) / 2
        below = np.searchsorted(ties, size, side="left")
        above = np.searchsorted(ties, size, side="right")
        code = np.where(below & 1, above, below).astype(np.uint8)
        code |= np.signbit(values).astype(np.uint8) << np.uint8(self.bits - 1)
        return np.where(np.isnan(values), np.uint8((1 << self.bits - 1) - 1), code)


FORMATS = {
    "e4m3": Narrow(4, 3, 7, nans=1),
    "e5m2": Narrow(5, 2, 15, nans=3, infinity=True),
    "e2m3": Narrow(2, 3, 1),
    "e3m2": Narrow(3, 2, 3),
    "e2m1": Narrow(2, 1, 1),
}
UE8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
# A scale with its sign bit set means nothing: NaN.
UE4M3 = np.where(np.arange(256) < 128, FORMATS["e4m3"].table, np.float32(np.nan))
# E2M1[byte]: the two numbers of a byte, the low nibble's first.
E2M1 = FORMATS["e2m1"].table[np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)]


def to_ue8m0(values: np.ndarray, mode: str) -> np.ndarray:
    """float32 -> bytes of ue8m0, rounded up (rp) or toward zero (rz), clamped to 2**-127 … 2**127.

    The sign is ignored, as the format has none (CUDA's own conversion does so, too). NaN becomes 0xff.
    """
    with np.errstate(invalid="ignore"):
        fraction, exponent = np.frexp(np.abs(values).astype(np.float64))  # fraction in [0.5, 1)
    power = exponent - 1 + (fraction > 0.5 if mode == "rp" else 0)
    power = np.where(fraction == 0, -127, np.where(np.isinf(values), 127, power))
    code = (np.clip(power, -127, 127) + 127).astype(np.uint8)
    return np.where(np.isnan(values), np.uint8(0xFF), code)
