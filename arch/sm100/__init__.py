"""Kernels for Blackwell: tcgen05 and tensor memory; and those of the sm80 tree for what they do not serve."""

from __future__ import annotations

from dataclasses import replace

from .. import sm80
from ..backward import FORWARD_ONLY, steps_around
from ..kernel import Kernel
from .backward import tuning as backward
from .forward import FORWARD
from .fp8 import QUANTIZED
from .fp8_backward import QUANTIZED_BACKWARD
from .latent import LATENT
from .scaled import BLOCK_SCALED
from .sums import sums_of
from .widened import WIDENED

# After FlashAttention-4's backward pass (Zadouri et al. 2026).
BACKWARD = Kernel(
    name="sm100.backward",
    operation="backward",
    support=replace(FORWARD.support, features=FORWARD.support.features - FORWARD_ONLY),
    tuning=backward.TABLE.tuning,
    launches=".sm100.backward.kernel:BackwardKernel",
    around=lambda own, device: steps_around(own, device, sm80.POSTPROCESS, sums_of),
)

KERNELS = (
    FORWARD, LATENT, QUANTIZED, BLOCK_SCALED, WIDENED, BACKWARD, QUANTIZED_BACKWARD, *sm80.KERNELS,
)  # fmt: skip
