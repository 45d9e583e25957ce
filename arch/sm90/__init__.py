"""Kernels for Hopper: TMA, warpgroup MMA, specialised warpgroups; and those of the sm80 tree for the rest."""

from __future__ import annotations

from dataclasses import replace

from .. import sm80
from ..backward import steps_around
from ..kernel import Kernel, Tuning
from ..sm80.backward.tuning import PostprocessConfig, main_blocks
from .backward import tuning as backward
from .forward import FORWARD

# Sums lie as the accumulators of one warpgroup, whose four warps have 64 rows below each other.
SUMS = PostprocessConfig(rows=backward.ROWS, grid=(4, 1))
# After FlashAttention-3's backward pass (Shah et al. 2024, section 3).
BACKWARD = Kernel(
    name="sm90.backward",
    operation="backward",
    support=replace(
        FORWARD.support, head_dims=range(8, 129, 8), features=FORWARD.support.features - {"split_kv"}
    ),
    tuning=Tuning(
        config=lambda problem, device, sizes: backward.main_config(problem, device),
        fitting=backward.fitting_configs,
        blocks=main_blocks,
    ),
    launches=".sm90.backward.kernel:BackwardKernel",
    around=lambda own, device: steps_around(own, device, sm80.POSTPROCESS, lambda problem, config: SUMS),
)

KERNELS = (FORWARD, BACKWARD, *sm80.KERNELS)
