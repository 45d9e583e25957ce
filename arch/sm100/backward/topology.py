"""What the roles of Blackwell's backward kernel hand to each other."""

from __future__ import annotations

from ...common.topology import Link, Topology
from .config import NUMBERS, OF_PAIRS, WARPGROUPS, Config

WARPGROUP = 4  # warps


def topology(config: Config) -> Topology:
    """K and V come once. LSE and D come together, apart from the tiles: who computes reads them.

    What dP and dS lie in, and S and P where they share columns, is free again when the next of the five
    products runs: see `plan`. A pair's CTAs have the same links; what its leader waits for, both fill.
    """
    compute = ("compute",) * WARPGROUPS
    ctas = config.ctas

    def link(name: str, producers: tuple, consumers: tuple, slots: int = 1, **more) -> Link:
        return Link(name=name, producers=producers, consumers=consumers, slots=slots, **more)

    of_pairs = (
        *(link(name, ("load",), ("mma",)) for name in OF_PAIRS if name in config.moved),
        link("peer_ds", ("peer",), ("mma",), emptied=False),
        link("relayed", ("relay",), ("mma",), emptied=False),
    )

    links = (
        *(
            link(name, ("load",), ("mma",), slots)
            for name, slots in (("k", 1), ("v", 1), ("q", config.q_stages), ("grad_out", config.out_stages))
        ),
        link("numbers", ("load",), compute, NUMBERS),
        link("s", ("mma",), compute, emptied=config.s_emptied, ctas=ctas),
        link("p", compute, ("mma",), emptied=config.p_apart, filling=ctas),
        link("dp", ("mma",), compute, emptied=False),
        link("ds", compute, ("mma",), emptied=False, filling=ctas),
        link("grad_q", ("mma",), ("store",), ctas=ctas),
        link("grad_kv", ("mma",), compute, emptied=False),
        *(of_pairs if config.paired else ()),
    )
    arrivals = {"load": 1, "mma": 1, "compute": WARPGROUP, "store": WARPGROUP, "peer": 1, "relay": 1}
    return Topology(links=links, arrivals=arrivals)
