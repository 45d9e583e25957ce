"""Memory by name: the regions of a kernel's tensor or shared memory, and what lies over what.

    Region(name="s", size=128, filled="qk", read="softmax")
    Region(name="p", size=64, filled="softmax", read="pv", over="s")       in S's places

`filled` and `read` are a region's lifetime: the steps, of those that a kernel goes through in order, in which
it is first written and last read. What lies over another region is filled no sooner than that was read for
the last time: in that same step, too, where a thread reads what it then writes over. That the other is not
filled anew while this is read is for the links between roles to see to.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Region:
    """`count` places of `size` side by side. over: the region whose places these are, or None: its own."""

    name: str
    size: int
    filled: str
    read: str
    count: int = 1
    over: str | None = None


@dataclass(frozen=True, kw_only=True)
class Regions:
    """regions: in the order of their places. steps: that lifetimes are told in. unit: of sizes. room: how
    many there are, or None where others see to it.

    ValueError for two regions of one name, a step or a region that is not known, lifetimes that end before
    they begin or that cross in one place, and for more than there is room for.
    """

    regions: tuple[Region, ...]
    steps: tuple[str, ...]
    unit: str
    room: int | None = None

    def __post_init__(self) -> None:
        for region in self.regions:
            namesakes = [other for other in self.regions if other.name == region.name]
            if len(namesakes) > 1:
                raise ValueError(f"{len(namesakes)} regions are called {region.name}")
            unknown = {region.filled, region.read} - set(self.steps)
            if unknown:
                raise ValueError(f"{region}: no step {sorted(unknown)}; there are {', '.join(self.steps)}")
            if self._when(region.filled) > self._when(region.read):
                raise ValueError(f"{region} is read before it is filled")
            if region.over is not None and region.over not in self.places():
                raise ValueError(f"{region}: no region {region.over} with places of its own to lie over")
            if region.count != self[region.over or region.name].count:
                raise ValueError(f"{region} has not as many places as {self[region.over]}")
        for place in self.places():
            for one, other in combinations(self.sharing(place), 2):
                if not (self._follows(one, other) or self._follows(other, one)):
                    raise ValueError(f"{one} and {other} are in use at once, and lie in the same places")
        if self.room is not None and self.used > self.room:
            taken = ", ".join(f"{self[place].count} x {place}" for place in self.places())
            raise ValueError(f"{taken} takes {self.used} {self.unit}, there are {self.room}")

    def __getitem__(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    def places(self) -> list[str]:
        """Names of the regions with places of their own."""
        return [region.name for region in self.regions if region.over is None]

    def sharing(self, place: str) -> list[Region]:
        """The region with these places, and those that lie over it."""
        return [region for region in self.regions if place in (region.name, region.over)]

    def size(self, place: str) -> int:
        """Of one of its places: what the largest takes that lies there."""
        return max(region.size for region in self.sharing(place))

    def at(self, name: str, index: Any) -> Any:
        """Where place `index` of a region begins: a number, or one that the kernel computes."""
        place = self[name].over or name
        return self._first(place) + index * self.size(place)

    @property
    def used(self) -> int:
        """What all take together."""
        return sum(self.size(place) * self[place].count for place in self.places())

    def _first(self, place: str) -> int:
        before = self.places()[: self.places().index(place)]
        return sum(self.size(name) * self[name].count for name in before)

    def _when(self, step: str) -> int:
        return self.steps.index(step)

    def _follows(self, one: Region, other: Region) -> bool:
        """Whether `one` is filled when `other` has been read."""
        return self._when(one.filled) >= self._when(other.read)
