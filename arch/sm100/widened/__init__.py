"""Attention to a cache of 8 bits for Blackwell: a warpgroup widens K and V between copy and products."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from . import tuning

WIDENED = Kernel(
    name="sm100.widened",
    operation="widened",
    support=Support(
        capabilities=((10, 0), (11, 0)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(16, 257, 16),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "score", "sink", "lse", "split_kv",
                "kv_cache", "paged_kv", "schedule",
            )
        ),
        page_sizes=PAGE_STEP,
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm100.widened.kernel:WidenedKernel",
)
