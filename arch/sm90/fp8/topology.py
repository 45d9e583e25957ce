"""What the roles of Hopper's FP8 kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from .config import TRANSPOSED, Config

TRANSPOSERS = 3  # warps


def topology(config: Config) -> Topology:
    """V goes through the transposers, K and Q do not."""
    compute = ("compute",)
    return Topology(
        links=(
            Link(name="q", producers=("load",), consumers=compute, slots=1),
            Link(name="k", producers=("load",), consumers=compute, slots=config.stages),
            Link(name="v", producers=("load",), consumers=("transpose",), slots=config.stages),
            Link(name="transposed", producers=("transpose",), consumers=compute, slots=TRANSPOSED),
        ),
        arrivals={"load": 1, "transpose": TRANSPOSERS, "compute": 4 * config.consumers},
    )
