"""What a machine is made of: SMs, their schedulers, warps, and spans of what lanes did."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from .costs import UNITS, Cost
from .joins import NEVER
from .trace import Event

SCHEDULERS = 4
SCOREBOARDS = 6
Step = tuple[Cost, Event | None, bool]  # an instruction, what it means, whether the next one is elsewhere


@dataclass(slots=True)
class Span:
    """What a lane did in some time; cause: for a wait, (who ended it, since when that was under way)."""

    lane: str
    name: str
    start: float
    end: float
    cause: tuple[str, float] | None = None


@dataclass(slots=True)
class Scheduler:
    """A quarter of an SM. free: when each of UNITS takes its next instruction; planned: its next turn."""

    sm: Sm
    warps: list[Warp] = field(default_factory=list)
    free: list[float] = field(default_factory=lambda: [0.0] * len(UNITS))
    busy: list[float] = field(default_factory=lambda: [0.0] * len(UNITS))
    queue: deque[float] = field(default_factory=deque)
    planned: float = NEVER
    last: Warp | None = None
    yielded: bool = False  # the last one gives away its next turn
    next: float = 0.0
    issued: int = 0


@dataclass(slots=True)
class Sm:
    """What the schedulers of an SM share: when each is free."""

    number: int
    shared: float = 0.0
    fill: float = 0.0
    sync: float = 0.0
    tma: float = 0.0
    tensor: float = 0.0
    sums: float = 0.0
    lost: int = 0  # issue slots of 32 that operands of a running wgmma take
    taken: float = 0.0  # part of shared memory's clocks that the running product takes
    products: deque[tuple[float, str, float]] = field(default_factory=deque)  # ends of wgmma, by warpgroup
    busy: Counter[str] = field(default_factory=Counter)
    nbytes: float = 0.0  # from L2


@dataclass(slots=True)
class Warp:
    """One warp on its way. ready: from when it may issue; cause: what it waited for until then."""

    name: str
    cta: int
    group: str
    steps: list[Step]
    scheduler: Scheduler = None  # type: ignore[assignment]
    at: int = 0
    ready: float = 0.0
    since: float = 0.0
    cause: str = ""
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    causes: list[str] = field(default_factory=lambda: [""] * SCOREBOARDS)
    copies: list[float] = field(default_factory=list)  # ends of groups of copies and of bulk stores
    copied: float = 0.0
    closed: int = 0  # groups of wgmma
    products: int = 0
    tensor_end: float = 0.0
    ended: float = NEVER
    lost: Counter[str] = field(default_factory=Counter)
