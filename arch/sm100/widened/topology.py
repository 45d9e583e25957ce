"""What the roles of Blackwell's kernel for caches of 8 bits hand to each other."""

from __future__ import annotations

from dataclasses import replace

from ...common.topology import Link, Topology
from ...widened import WidenedProblem
from ..forward.topology import topology as forward
from .config import WIDENERS, Config


def topology(problem: WidenedProblem, config: Config) -> Topology:
    """As for 16 bits, but that K and V go through the wideners."""
    found, load, widen = forward(problem, config), ("load",), ("widen",)
    links = [
        replace(link, producers=widen, slots=config.wide) if link.name in ("k", "v") else link
        for link in found.links
    ]
    for name, slots in (("narrow_k", config.k_stages), ("narrow_v", config.v_stages)):
        links.append(Link(name=name, producers=load, consumers=widen, slots=slots))
    return Topology(links=tuple(links), arrivals={**found.arrivals, "widen": WIDENERS})
