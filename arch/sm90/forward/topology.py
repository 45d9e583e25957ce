"""What the roles of Hopper's forward kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from ..config import Config


def topology(config: Config) -> Topology:
    """K and V apart, so that a product waits for its own tile only; Q in one piece."""
    channels = {"q": 1, "k": config.stages, "v": config.stages}
    return Topology(
        links=tuple(
            Link(name=name, producers=("load",), consumers=("compute",), slots=slots)
            for name, slots in channels.items()
        ),
        arrivals={"load": 1, "compute": 4 * config.consumers},
    )
