"""Gradients in FP8 for Hopper: as for 16 bits, but sums over rows take copies by columns."""

from __future__ import annotations

from ...backward import steps_around
from ...kernel import Kernel
from ...problem import Support
from ...quantized_backward import QUANTIZED_PREPROCESS
from ...sm80 import QUANTIZED_POSTPROCESS
from ...transposed import with_columns
from ..sums import SUMS
from . import tuning

QUANTIZED_BACKWARD = Kernel(
    name="sm90.fp8_backward",
    operation="quantized_backward",
    support=Support(
        capabilities=((9, 0), (9, 0)),
        dtypes=("float8_e4m3fn",),
        head_dims=range(16, 129, 16),
        features=frozenset((
            "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "sink", "lse",
        )),
    ),
    tuning=tuning.TABLE.tuning,
    launches=".sm90.fp8_backward.kernel:QuantizedBackwardKernel",
    around=lambda own, device: with_columns(
        steps_around(own, device, QUANTIZED_POSTPROCESS, lambda problem, config: SUMS, QUANTIZED_PREPROCESS)
    ),
)
