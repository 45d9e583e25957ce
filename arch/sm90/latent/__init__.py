"""Latent attention for Hopper (MLA): rows of K whose first columns are V, one tile for both products."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernel import Kernel
from ...problem import PAGE_STEP, Asked, Device, Support
from . import tuning
from .config import PART, V_STEP


@dataclass(frozen=True)
class LatentSupport(Support):
    """Head dims as wgmma and swizzled tiles take them whole."""

    def reasons(self, problem: Asked, device: Device) -> tuple[str, ...]:
        found = super().reasons(problem, device)
        if "latent_kv" not in problem.features():
            found = (*found, "serves only V that is K's first columns")
        sizes = problem.known_sizes()
        if sizes.get("head_dim_v", 0) % V_STEP:
            found = (*found, f"head_dim_v {sizes['head_dim_v']} is not a multiple of {V_STEP}")
        return found


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
    ),
    tuning=tuning.FORWARD.tuning,
    launches=".sm90.latent.kernel:LatentKernel",
)
