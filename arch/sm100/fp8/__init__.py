"""Attention forward in FP8 for Blackwell: as for 16 bits, both products by `tcgen05.mma` kind::f8f6f4."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from ...quantized import DTYPES
from . import tuning

QUANTIZED = Kernel(
    name="sm100.fp8",
    operation="quantized",
    support=Support(
        capabilities=((10, 0), (11, 0)),
        dtypes=DTYPES,
        head_dims=range(16, 257, 16),
        features=frozenset((
            "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "sink", "lse",
            "split_kv", "scale_blocks", "scale_blocks_64", "kv_cache", "paged_kv", "schedule",
        )),
        page_sizes=PAGE_STEP,
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm100.fp8.kernel:QuantizedKernel",
)
