"""What the roles of Hopper's latent kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from ...problem import Problem
from .config import Config
from .parts import RANGES, Parts


def topology(problem: Problem, config: Config) -> Topology:
    """K in parts of a tile; its places are freed in ranges, each by the warpgroup that reads them last."""
    parts, ranges = config.stages * Parts.of(problem).count, config.stages * RANGES
    load, compute = ("load",), ("compute",)
    return Topology(
        links=(
            Link(name="q", producers=load, consumers=compute, slots=1, emptied=False),
            Link(name="k", producers=load, consumers=compute, slots=parts, emptied=False),
            Link(name="freed", producers=compute, consumers=load, slots=ranges, emptied=False),
        ),
        arrivals={"load": 1, "compute": 4},
    )
