"""Attention forward in FP8 for Hopper: both products e4m3, V transposed on its way, sums in two levels."""

from __future__ import annotations

from ...kernel import Kernel
from ...precision import FLOAT8_E4M3
from ...problem import Support
from . import tuning

# After FlashAttention-3's FP8 forward (Shah et al. 2024, section 3.3).
QUANTIZED = Kernel(
    name="sm90.fp8",
    operation="quantized",
    support=Support(
        capabilities=((9, 0), (9, 0)),
        dtypes=(FLOAT8_E4M3.name,),
        head_dims=range(32, 129, 32),
        features=frozenset(("dense", "gqa", "split_dims", "mask", "lse", "scale_blocks")),
    ),
    tuning=tuning.TUNING,
    launches=".sm90.fp8.kernel:QuantizedKernel",
)
