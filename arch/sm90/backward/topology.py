"""What the roles of Hopper's backward kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from .config import Tiling

WARPGROUP = 4  # warps


def topology(config: Tiling) -> Topology:
    """K and V come once. LSE comes with Q, D with dO, since that is where each is used first.

    The CTAs of a pair bring half of Q and of dO each, for both. Every warpgroup has a slot of dQ of its own,
    and a warp that brings it away. dS of the other CTA of a pair comes by bulk copies.
    """
    compute = ("compute",) * config.warpgroups
    channels = {"k": (1, 1), "v": (1, 1), "q": (config.q_stages, config.ctas)}
    channels["grad_out"] = config.grad_out_stages, config.ctas
    exchanged = Link(name="peer_ds", producers=("peer",), consumers=compute, slots=1)
    return Topology(
        links=(
            *(
                Link(name=name, producers=("load",), consumers=compute, slots=slots, ctas=ctas)
                for name, (slots, ctas) in channels.items()
            ),
            Link(name="grad_q", producers=("compute",), consumers=("store",), slots=config.warpgroups),
            *((exchanged,) if config.ctas > 1 else ()),
        ),
        arrivals={"load": 1, "compute": WARPGROUP, "store": 1, "peer": 1},
    )
