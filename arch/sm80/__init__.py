"""Kernels for Ampere and everything that runs its instructions: cp.async, ldmatrix, mma.sync.

No roles and no mbarriers: every warp loads, multiplies and stores. Other trees may list these kernels.
"""

from __future__ import annotations

from dataclasses import replace

from ..append import APPEND
from ..backward import FORWARD_ONLY, PREPROCESS, steps_around
from ..combine import COMBINE
from ..kernel import Kernel, Tuning
from ..problem import Support
from ..quantize import QUANTIZE
from . import tuning
from .backward import tuning as backward
from .widened import WIDENED

# FlashAttention-2's algorithm (Dao 2023, algorithm 1).
FORWARD = Kernel(
    name="sm80.forward",
    operation="forward",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 577, 8),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "dropout",
                "sink", "lse", "split_kv", "kv_cache", "paged_kv", "latent_kv", "schedule",
            )
        ),
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm80.forward:ForwardKernel",
)

POSTPROCESS = Kernel(
    name="sm80.postprocess",
    operation="postprocess",
    support=PREPROCESS.support,
    tuning=Tuning(config=lambda problem, device, sizes: None, blocks=backward.postprocess_blocks),
    launches=".sm80.backward.postprocess:PostprocessKernel",
)
QUANTIZED_POSTPROCESS = replace(
    POSTPROCESS,
    name="sm80.quantized_postprocess",
    launches=".sm80.backward.quantized:QuantizedPostprocessKernel",
)
# FlashAttention-2's backward pass (Dao 2023, algorithm 2).
BACKWARD = Kernel(
    name="sm80.backward",
    operation="backward",
    support=replace(
        FORWARD.support,
        head_dims=PREPROCESS.support.head_dims,
        features=FORWARD.support.features - FORWARD_ONLY,
    ),
    tuning=backward.TABLE.tuning,
    launches=".sm80.backward.main:BackwardKernel",
    around=lambda own, device: steps_around(own, device, POSTPROCESS, backward.PostprocessConfig.of),
)

KERNELS = (FORWARD, WIDENED, COMBINE, APPEND, QUANTIZE, BACKWARD)
