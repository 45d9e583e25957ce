"""Who hands what to whom: a kernel's links between roles as one table, and the barriers that follow from it.

    Link("k", producers=("load",), consumers=("mma",), slots=3)        load --k--> mma

Each slot of a link has a barrier that its producers complete when it is full, and one that its consumers
complete when it is empty again; none where other links tell that it may be filled, or nobody fills it twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Link:
    """`slots` places side by side. producers, consumers: roles, one as often as its parts are counted.

    ctas: of the group that hands over together, whose leader counts what consumers of all of them do.
    filling: those whose producers it counts. emptied: consumers tell when a slot may be filled again.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    slots: int
    ctas: int = 1
    filling: int = 1
    emptied: bool = True

    def __str__(self) -> str:
        return f"{', '.join(self.producers)} --{self.name}--> {', '.join(self.consumers)}"


class Barriers(NamedTuple):
    """A link's, in order: one for each full slot, from number `first` of the CTA's; one for each empty one.

    full_arrivals, empty_arrivals: what completes a phase of each; no empty ones where that is 0.
    """

    first: int
    slots: int
    full_arrivals: int
    empty_arrivals: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.slots * (2 if self.empty_arrivals else 1)


@dataclass(frozen=True)
class Topology:
    """links: in the order of their barriers. arrivals: at a slot's barrier, by role: of its warps, or 1 where
    TMA or tcgen05 arrives for it.

    ValueError for two links of one name, a role that is not known, and a link without producer, consumer or
    slot.
    """

    links: tuple[Link, ...]
    arrivals: Mapping[str, int]

    def __post_init__(self) -> None:
        names = [link.name for link in self.links]
        if len(set(names)) < len(names):
            raise ValueError(f"links of the same name among {names}")
        for link in self.links:
            unknown = {*link.producers, *link.consumers} - set(self.arrivals)
            if unknown:
                raise ValueError(f"{link}: no role {sorted(unknown)}; there are {sorted(self.arrivals)}")
            if not (link.producers and link.consumers and link.slots > 0):
                raise ValueError(f"{link}: needs a producer, a consumer and a slot, has {link.slots} slots")

    def __getitem__(self, name: str) -> Barriers:
        return next(barriers for link, barriers in self.placed() if link.name == name)

    def placed(self) -> Iterator[tuple[Link, Barriers]]:
        """Every link and its barriers."""
        first = 0
        for link in self.links:
            full = sum(self.arrivals[role] for role in link.producers) * link.filling
            empty = sum(self.arrivals[role] for role in link.consumers) * link.ctas * link.emptied
            barriers = Barriers(first, link.slots, full, empty)
            yield link, barriers
            first += barriers.count

    @property
    def count(self) -> int:
        """Barriers of a CTA."""
        return sum(barriers.count for _, barriers in self.placed())

    def __str__(self) -> str:
        """The picture: a line for each link."""
        return "\n".join(map(str, self.links))
