"""Kernels for Ampere and everything that runs its instructions: cp.async, ldmatrix, mma.sync.

No roles and no mbarriers: every warp loads, multiplies and stores. Other trees may list these kernels.
"""

from __future__ import annotations

from ..combine import COMBINE
from ..kernel import Kernel
from ..problem import Support
from . import tuning

# FlashAttention-2's algorithm (Dao 2023, algorithm 1).
FORWARD = Kernel(
    name="sm80.forward",
    operation="forward",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "dropout",
                "sink", "lse", "split_kv",
            )
        ),
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm80.forward:ForwardKernel",
)

KERNELS = (FORWARD, COMBINE)
