"""What the roles of Blackwell's latent kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from ...problem import Problem
from ..forward.topology import WARPGROUP
from .config import Config, k_parts, v_parts


def topology(problem: Problem, config: Config) -> Topology:
    """A CTA's links; the other's are the same. Places of K and V are parts of tiles."""

    def link(name: str, producer: str, consumers: tuple[str, ...], slots: int, **more) -> Link:
        return Link(name=name, producers=(producer,), consumers=consumers, slots=slots, **more)

    return Topology(
        links=(
            link("q", "load_k", ("mma",), 1),
            link("k", "load_k", ("mma",), config.k_stages * k_parts(problem)),
            link("v", "load_v", ("mma",), config.v_stages * v_parts(problem)),
            link("s", "mma", ("softmax", "correction"), config.slots, ctas=config.ctas),
            link("factors", "softmax", ("correction",), config.slots, emptied=False),
            link("final_scale", "softmax", ("correction",), 1, emptied=False),
            link("o", "mma", ("correction", "softmax"), 1, emptied=False),
            link("out", "correction", ("store",), 1, emptied=False),
        ),
        arrivals={
            "softmax": WARPGROUP, "correction": WARPGROUP, "mma": 1, "load_k": 1, "load_v": 1, "store": 1,
        },
    )
