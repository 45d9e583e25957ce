"""Meetings: phases of barriers, groups of products. A join is over when all who join it have come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

NEVER = float("inf")


@dataclass(slots=True)
class Join:
    """missing: arrivals to come. time: of the last one so far; it may lie ahead, as units tell it at issue.

    last: who that was, and since when it was under way. waiting: to call with the time, once it is known.
    """

    missing: int
    time: float = 0.0
    last: str = ""
    since: float = 0.0
    waiting: list[Callable[[Join], None]] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether everyone has come, or said when."""
        return self.missing <= 0

    def arrive(self, time: float, who: str, since: float) -> None:
        """One of them comes at a time. Raises ValueError where nobody is missing."""
        if self.missing <= 0:
            raise ValueError(f"{who} arrives where nobody is missing")
        self.missing -= 1
        if time >= self.time:
            self.time, self.last, self.since = time, who, since
        if not self.missing:
            waiting, self.waiting = self.waiting, []
            for call in waiting:
                call(self)
