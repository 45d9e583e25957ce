"""Latent attention for Blackwell (MLA): a pair of CTAs shares 128 rows and the columns of V."""

from __future__ import annotations

from ...kernel import Kernel
from ...latent import LatentSupport
from ...problem import PAGE_STEP
from ..forward import FORWARD
from . import tuning
from .config import PART, V_STEP

LATENT = Kernel(
    name="sm100.latent",
    operation="forward",
    support=LatentSupport(
        capabilities=FORWARD.support.capabilities,
        dtypes=FORWARD.support.dtypes,
        head_dims=range(V_STEP, 577, PART),
        features=FORWARD.support.features - {"dropout", "block_mask"} | {"latent_kv"},
        page_sizes=PAGE_STEP,
        v_step=V_STEP,
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm100.latent.kernel:LatentKernel",
)
