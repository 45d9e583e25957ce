"""What the roles of Hopper's kernel for caches of 8 bits hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from .config import Config


def topology(config: Config) -> Topology:
    """K and V go through the wideners, Q does not."""
    load, widen, compute = ("load",), ("widen",), ("compute",)
    return Topology(
        links=(
            Link(name="q", producers=load, consumers=compute, slots=1),
            Link(name="narrow_k", producers=load, consumers=widen, slots=config.stages),
            Link(name="narrow_v", producers=load, consumers=widen, slots=config.stages),
            Link(name="k", producers=widen, consumers=compute, slots=config.wide),
            Link(name="v", producers=widen, consumers=compute, slots=config.wide),
        ),
        arrivals={"load": 1, "widen": 4 * config.wideners, "compute": 4 * config.consumers},
    )
