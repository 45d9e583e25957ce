"""Attention forward for Hopper: TMA, warpgroup MMA, specialised warpgroups."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from .. import tuning

# After FlashAttention-3 (Shah et al. 2024, algorithms 1 and 2).
FORWARD = Kernel(
    name="sm90.forward",
    operation="forward",
    support=Support(
        capabilities=((9, 0), (9, 0)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "dropout",
                "sink", "lse", "split_kv", "kv_cache", "paged_kv", "schedule",
            )
        ),
        page_sizes=PAGE_STEP,
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm90.forward.kernel:ForwardKernel",
)
