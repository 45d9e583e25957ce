"""Attention forward with block-scaled products for Blackwell: MXFP8, and NVFP4 for Q K."""

from __future__ import annotations

from ...kernel import Kernel
from ...problem import Support
from . import tuning

BLOCK_SCALED = Kernel(
    name="sm100.scaled",
    operation="quantized",
    support=Support(
        capabilities=((10, 0), (11, 0)),
        dtypes=("float8_e4m3fn", "float4_e2m1fn_x2"),
        head_dims=range(32, 257, 32),
        features=frozenset((
            "dense", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "sink", "lse", "split_kv",
            "mxfp8", "nvfp4",
        )),
        one_of=("mxfp8", "nvfp4"),
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm100.scaled.kernel:BlockScaledKernel",
)
