"""What the roles of Blackwell's forward kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from ...problem import Problem
from ..config import ANSWERS, Config

WARPGROUP = 4  # warps


def topology(problem: Problem, config: Config) -> Topology:
    """A CTA's links; a pair's CTAs have the same.

    The mma warp tells both CTAs what its products have filled, and its leader counts who empties that. What
    there is once for each tile need not be emptied, unless the CTA takes another tile.
    """
    tiles, scores = config.tiles, config.tiles * config.slots

    def link(name: str, producer: str, consumers: tuple[str, ...], slots: int, **more) -> Link:
        return Link(name=name, producers=(producer,), consumers=consumers, slots=slots, **more)

    links = [
        link("q", "load", ("mma",), tiles),
        link("k", "load", ("mma",), config.k_stages),
        link("v", "load", ("mma",), config.v_stages),
        link("s", "mma", ("softmax", "correction"), scores, ctas=config.ctas),
        link("factors", "softmax", ("correction",), scores, emptied=False),
        link("final_scale", "softmax", ("correction",), tiles, emptied=config.is_persistent),
        link("o", "mma", ("correction",), tiles, emptied=False),
        link("out", "correction", ("store",), tiles, emptied=config.is_persistent),
    ]
    if config.tail:
        links.append(link("tail", "softmax", ("mma",), scores, emptied=False, filling=config.ctas))
    if config.dynamic:
        store = () if problem.split_kv else ("store",)
        readers = (*("softmax",) * tiles, "correction", "mma", "load", *store)
        links.append(link("scheduler", "load", readers, ANSWERS, ctas=config.ctas))
    return Topology(
        links=tuple(links),
        arrivals={"softmax": WARPGROUP, "correction": WARPGROUP, "mma": 1, "load": 1, "store": 1},
    )
