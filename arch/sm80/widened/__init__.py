"""Attention to a cache of 8 bits: the forward kernel, whose keys and values are widened on their way."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import Support
from . import tuning

WIDENED = Kernel(
    name="sm80.widened",
    operation="widened",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(16, 257, 16),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "score", "sink", "lse", "split_kv",
                "kv_cache", "paged_kv", "schedule",
            )
        ),
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm80.widened.kernel:WidenedKernel",
)
