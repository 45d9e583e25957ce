"""Kernels for Hopper: TMA, warpgroup MMA, specialised warpgroups; and those of the sm80 tree for the rest."""

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
from .sums import SUMS
from .widened import WIDENED

# After FlashAttention-3's backward pass (Shah et al. 2024, section 3).
BACKWARD = Kernel(
    name="sm90.backward",
    operation="backward",
    support=replace(FORWARD.support, features=FORWARD.support.features - FORWARD_ONLY),
    tuning=backward.TABLE.tuning,
    launches=".sm90.backward.kernel:BackwardKernel",
    around=lambda own, device: steps_around(own, device, sm80.POSTPROCESS, lambda problem, config: SUMS),
)

KERNELS = (FORWARD, LATENT, QUANTIZED, WIDENED, BACKWARD, QUANTIZED_BACKWARD, *sm80.KERNELS)
