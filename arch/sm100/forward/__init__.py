"""Attention forward for Blackwell: TMA, tcgen05, tensor memory, five kinds of warps."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import PAGE_STEP, Support
from .. import tuning

# After FlashAttention-4 (Zadouri et al. 2026).
FORWARD = Kernel(
    name="sm100.forward",
    operation="forward",
    support=Support(
        capabilities=((10, 0), (11, 0)),
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
    launches=".sm100.forward.kernel:ForwardKernel",
)
