"""Attention to a cache of 8 bits for Hopper: warps widen K and V between their copy and their products."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from . import tuning

WIDENED = Kernel(
    name="sm90.widened",
    operation="widened",
    support=Support(
        capabilities=((9, 0), (9, 0)),
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
    launches=".sm90.widened.kernel:WidenedKernel",
)
