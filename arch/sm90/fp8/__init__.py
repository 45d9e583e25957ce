"""Attention forward in FP8 for Hopper: FP8 products, V transposed on its way, sums in two levels."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from ...quantized import DTYPES
from . import tuning

# After FlashAttention-3's FP8 forward (Shah et al. 2024, section 3.3).
QUANTIZED = Kernel(
    name="sm90.fp8",
    operation="quantized",
    support=Support(
        capabilities=((9, 0), (9, 0)),
        dtypes=DTYPES,
        head_dims=range(16, 257, 16),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "sink",
                "lse", "split_kv", "scale_blocks", "scale_blocks_64", "kv_cache", "paged_kv", "schedule",
            )
        ),
        page_sizes=PAGE_STEP,
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm90.fp8.kernel:QuantizedKernel",
)
