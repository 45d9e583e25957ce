"""What the roles of Hopper's backward kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from .tuning import Config

WARPGROUP = 4  # warps


def topology(config: Config) -> Topology:
    """K and V come once. LSE comes with Q, D with dO, since that is where each is used first.

    Every warpgroup has a slot of dQ of its own, and a warp that brings it away.
    """
    compute = ("compute",) * config.warpgroups
    channels = {"k": 1, "v": 1, "q": config.stages, "grad_out": config.stages}
    return Topology(
        links=(
            *(
                Link(name=name, producers=("load",), consumers=compute, slots=slots)
                for name, slots in channels.items()
            ),
            Link(name="grad_q", producers=("compute",), consumers=("store",), slots=config.warpgroups),
        ),
        arrivals={"load": 1, "compute": WARPGROUP, "store": 1},
    )
