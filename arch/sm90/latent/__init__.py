"""Latent attention for Hopper (MLA): rows of K whose first columns are V, one tile for both products."""

from __future__ import annotations

from ...kernel import Kernel
from ...latent import LatentSupport
from ...problem import PAGE_STEP
from . import tuning
from .config import PART, V_STEP

LATENT = Kernel(
    name="sm90.latent",
    operation="forward",
    support=LatentSupport(
        capabilities=((9, 0), (9, 0)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(V_STEP, 577, PART),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "score", "sink", "lse", "split_kv",
                "kv_cache", "paged_kv", "latent_kv", "schedule",
            )
        ),
        page_sizes=PAGE_STEP,
        v_step=V_STEP,
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm90.latent.kernel:LatentKernel",
)
