"""Gradients in FP8 for Blackwell: as for 16 bits, all five products by `tcgen05.mma` kind::f8f6f4."""

from __future__ import annotations

from ...backward import steps_around
from ...kernel import Kernel
from ...problem import Support
from ...quantized_backward import QUANTIZED_PREPROCESS
from ...sm80 import QUANTIZED_POSTPROCESS
from ..sums import sums_of
from . import tuning

QUANTIZED_BACKWARD = Kernel(
    name="sm100.fp8_backward",
    operation="quantized_backward",
    support=Support(
        capabilities=((10, 0), (11, 0)),
        dtypes=("float8_e4m3fn",),
        head_dims=range(16, 257, 16),
        features=frozenset((
            "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "sink", "lse",
        )),
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm100.fp8_backward.kernel:QuantizedBackwardKernel",
    around=lambda own, device: steps_around(
        own, device, QUANTIZED_POSTPROCESS, sums_of, QUANTIZED_PREPROCESS
    ),
)
