"""ld, st, atom, red and address conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError, OutOfBounds
from ..core.events import Order
from ..core.memory import UNSIGNED, WINDOW_SHIFT, WINDOWS
from ..ptx.operands import Symbol
from ..translate.translation import Operation, operation
from .turns import UPDATES, in_turn

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "const")
CACHE_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip
# Memory is sequentially consistent here, so these orderings hold by themselves; observers are told of them.
ORDERINGS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")
SCOPES = ("cta", "cluster", "gpu", "gl", "sys")
WEAK = Order()
TYPES = {f"{letter}{bits}": bits // 8 for letter in "bus" for bits in (8, 16, 32, 64)} | {
    "f32": 4,
    "f64": 8,
    "f16": 2,
}


class Access:
    """The address of an access of `size` bytes: which space, and how to get every thread's address as int64
    (n,).
    """

    def __init__(self, x: Operation, position: int, space: str, size: int):
        self.space = {"shared::cta": "shared", "param::entry": "param", "const": "global"}.get(space, space)
        operand = x.operand(position)
        base = getattr(operand, "base", None)
        if isinstance(base, Symbol):
            variable = x.translation.variable(base.name)
            if variable is not None and self.space not in ("", _home(variable.space)):
                raise x.unmodelled(f"{base.name} of .{variable.space} in .{space}")
            if variable is not None and not self.space:
                self.space = _home(variable.space)
        self.row, self.view, self.offset = x.address(position)
        if self.space in ("", "shared", "shared::cluster"):
            x.translation.shared_granule = min(x.translation.shared_granule, size)
        if self.space in ("", "global"):
            x.translation.global_granule = min(x.translation.global_granule, size)

    def of(self, m: Machine, g: Threads) -> np.ndarray:
        """Each thread's address, int64 (n,)."""
        address = m.rows[self.view][self.row][g.index].reshape(-1)
        if self.view == "u32":
            wide = address.astype(np.int64)
            return wide + self.offset & 0xFFFFFFFF if self.offset else wide
        wide = address.astype(np.int64)
        return wide + self.offset if self.offset else wide


def _home(space: str) -> str:
    return "global" if space == "const" else space


def read(
    m: Machine, g: Threads, space: str, address: np.ndarray, width: int, count: int, order: Order = WEAK
) -> np.ndarray:
    """Load `count` elements of `width` bytes per thread: (n, count). Space "" means generic addresses."""
    if space == "global":
        if m.watch is not None and not order.update:
            m.watch.global_read(m, g, address, width * count, order)
        return m.memory.load(m, g, address, width, count)
    if space in ("shared", "shared::cluster"):
        if m.watch is not None and not order.update:
            m.watch.shared_read(m, g, address, width * count)
        return m.shared.load(m, g, *m.place(g, address, space != "shared"), width, count)
    if space == "local":
        return m.local.load(m, g, g.flat, address, width, count)
    if space == "param":
        return m.params.load(m, g, address, width, count)
    values = np.empty((len(address), count), UNSIGNED[width])
    for name, members, some in _resolve(m, g, address):
        home = "shared::cluster" if name == "shared" else name
        values[members] = read(m, some, home, address[members] - WINDOWS[name], width, count, order)
    return values


def write(
    m: Machine, g: Threads, space: str, address: np.ndarray, values: np.ndarray, order: Order = WEAK
) -> None:
    """Store values (n, count) per thread."""
    if space == "global":
        if m.watch is not None:
            m.watch.global_write(m, g, address, values, order)
        m.memory.store(m, g, address, values)
    elif space in ("shared", "shared::cluster"):
        if m.watch is not None:
            m.watch.shared_write(m, g, address, values, order.update)
        m.shared.store(m, g, *m.place(g, address, space != "shared"), values)
    elif space == "local":
        m.local.store(m, g, g.flat, address, values)
    elif space == "param":
        raise m.fault(EmulatorError, g, 0, "parameter memory cannot be written")
    else:
        for name, members, some in _resolve(m, g, address):
            home = "shared::cluster" if name == "shared" else name
            write(m, some, home, address[members] - WINDOWS[name], values[members], order)


def _resolve(m: Machine, g: Threads, address: np.ndarray) -> list[tuple[str, np.ndarray, Threads]]:
    """The spaces that generic addresses fall into, with the positions and the threads of each."""
    window = address >> WINDOW_SHIFT
    found = []
    for space, start in WINDOWS.items():
        chosen = window == start >> WINDOW_SHIFT
        if chosen.all():
            return [(space, np.arange(g.size), g)]
        if chosen.any():
            found.append((space, np.flatnonzero(chosen), m.sets.select(g, chosen.reshape(g.shape))))
    if sum(len(members) for _, members, _ in found) != g.size:
        k = int(np.flatnonzero((window < 0) | (window > max(WINDOWS.values()) >> WINDOW_SHIFT))[0])
        raise m.fault(OutOfBounds, g, k, f"the generic address {int(address[k]):#x} lies in no space")
    return found


def _order(x: Operation, default: str, **more: bool) -> Order:
    """How an access is ordered. Scopes below the GPU's are as good as none between CTAs."""
    kind = x.one_of(*ORDERINGS, default=default)
    scope = x.one_of(*SCOPES, default="gpu")
    if kind == "weak" or scope in ("cta", "cluster"):
        return Order(**more)
    return Order(True, kind in ("acquire", "acq_rel"), kind in ("release", "acq_rel"), **more)


def _form(x: Operation) -> tuple[str, int, str]:
    """(space, vector length, type) after consuming hints."""
    x.without_effect(*CACHE_HINTS)
    space = x.one_of(*SPACES, default="")
    count = {"": 1, "v2": 2, "v4": 4, "v8": 8}[x.one_of("v2", "v4", "v8", default="")]
    return space, count, x.type(*TYPES)


@operation("ld")
def ld(x: Operation) -> Callable:
    """Load one value or a vector; narrow types are extended into wider registers."""
    hinted = x.flag("L2::cache_hint")
    order = _order(x, "weak", lasting="nc" in x.modifiers)
    space, count, kind = _form(x)
    if hinted:
        x.source(2, "u64")
    width = TYPES[kind]
    access = Access(x, 1, space, width * count)
    items = x.vector(0)
    if len(items) != count:
        raise x.unmodelled(f"{len(items)} destinations")
    view = f"{'s' if kind[0] == 's' else 'u'}{8 * width}"
    dests = [x.wide_dest_of(item, view) for item in items]
    signed = kind[0] == "s"
    targets = [(d, f"{'s' if signed else 'u'}{bits}") for d, bits in dests]
    where = access.space

    def step(m: Machine, g: Threads) -> None:
        values = read(m, g, where, access.of(m, g), width, count, order)
        if signed:
            values = values.view(f"i{width}")
        for k, (d, target) in enumerate(targets):
            m.rows[target][d][g.index] = values[:, k].reshape(g.shape)

    return step


@operation("st")
def st(x: Operation) -> Callable:
    """Store one value or a vector; a wider register gives its low bits."""
    hinted = x.flag("L2::cache_hint")
    order = _order(x, "weak")
    space, count, kind = _form(x)
    if hinted:
        x.source(2, "u64")
    width = TYPES[kind]
    access = Access(x, 0, space, width * count)
    items = x.vector(1)
    if len(items) != count:
        raise x.unmodelled(f"{len(items)} values")
    view = f"u{8 * width}"
    sources = [x.wide_source_of(item, view) for item in items]
    where = access.space

    def step(m: Machine, g: Threads) -> None:
        values = np.empty((g.size, count), UNSIGNED[width])
        for k, (a, have) in enumerate(sources):
            values[:, k] = m.rows[have][a][g.index].reshape(-1)
        write(m, g, where, access.of(m, g), values, order)

    return step


@operation("atom", "red")
def atom(x: Operation) -> Callable:
    """Read-modify-write; threads that meet at one address take turns, by warp, CTA and lane."""
    returns = x.name == "atom"
    order = _order(x, "relaxed", update=True, returns=returns)
    x.without_effect("noftz")
    space = x.one_of("global", "shared", "shared::cta", default="")
    name = x.one_of(*UPDATES)
    kind = x.type("b16", "b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64")
    if (kind == "b16" and name != "cas") or (kind[0] == "f" and name != "add"):
        raise x.unmodelled(f".{name}.{kind}")
    order = order._replace(sums=kind[0] == "f")
    view = kind if kind[0] != "b" else f"u{kind[1:]}"
    access = Access(x, int(returns), space, int(kind[1:]) // 8)
    d = x.dest(0, view) if returns else None
    sources = [x.source(int(returns) + 1 + k, view) for k in range(2 if name == "cas" else 1)]
    # The ISA says that global f32 additions flush subnormal numbers and shared ones do not.
    update = UPDATES["flushed add" if kind == "f32" and access.space == "global" else name]

    def step(m: Machine, g: Threads) -> None:
        address = access.of(m, g)
        operands = [np.ascontiguousarray(m.rows[view][a][g.index].reshape(-1)) for a in sources]
        dtype = operands[0].dtype
        found = read(m, g, access.space, address, dtype.itemsize, 1, order).view(dtype)[:, 0]
        old, new = in_turn(_places(m, g, access.space, address), found, operands, update)
        words = np.ascontiguousarray(new).view(UNSIGNED[dtype.itemsize])
        write(m, g, access.space, address, words[:, None], order)
        if d is not None:
            m.rows[view][d][g.index] = old.reshape(g.shape)

    return step


def _places(m: Machine, g: Threads, space: str, address: np.ndarray) -> np.ndarray:
    """A number for each thread's address that is the same where two touch the same memory."""
    if space == "global":
        return address
    if space == "shared":
        owner, local = m.place(g, address, False)
        return (owner + 1 << WINDOW_SHIFT) + local
    places = np.empty_like(address)
    for name, members, some in _resolve(m, g, address):
        within = address[members] - WINDOWS[name]
        if name == "shared":
            owner, local = m.place(some, within, True)
            within = (owner + 1 << WINDOW_SHIFT) + local
        places[members] = within
    return places


def _window(space: str) -> str:
    """The window of generic addresses that a space lies in."""
    home = {"shared::cta": "shared", "shared::cluster": "shared", "param::entry": "param", "const": "global"}
    return home.get(space, space)


@operation("cvta")
def cvta(x: Operation) -> Callable:
    """Between generic addresses and a space's own; `to` is the way back."""
    back = x.flag("to")
    space = x.one_of(*SPACES)
    x.type("u64")
    home = _window(space)
    window = np.uint64(WINDOWS[home])
    d, a = x.dest(0, "u64"), x.source(1, "u64")

    def step(m: Machine, g: Threads) -> None:
        rows, at = m.rows["u64"], g.index
        rows[d][at] = rows[a][at] - window if back else rows[a][at] + window

    return step


@operation("isspacep")
def isspacep(x: Operation) -> Callable:
    """Whether a generic address lies in a space."""
    space = x.one_of(*SPACES)
    home = _window(space)
    d, a = x.dest(0, "pred"), x.source(1, "u64")
    number = np.uint64(WINDOWS[home] >> WINDOW_SHIFT)

    def step(m: Machine, g: Threads) -> None:
        m.rows["pred"][d][g.index] = m.rows["u64"][a][g.index] >> np.uint64(WINDOW_SHIFT) == number

    return step


@operation("prefetch", "prefetchu")
def prefetch(x: Operation) -> Callable:
    """Cache management: changes no result."""
    x.without_effect("global", "local", "L1", "L2", "L2::evict_last", "L2::evict_normal")
    x.address(0)
    return lambda m, g: None


@operation("createpolicy")
def createpolicy(x: Operation) -> Callable:
    """An L2 cache policy: any value serves, since policies change no result."""
    x.modifiers.clear()
    for position in range(1, x.count()):
        x.operand(position)
    d = x.dest(0, "u64")

    def step(m: Machine, g: Threads) -> None:
        m.rows["u64"][d][g.index] = 0

    return step


@operation("membar", "fence")
def fence(x: Operation) -> Callable:
    """Memory is sequentially consistent here: only observers learn of a fence."""
    kind = x.one_of("sc", "acq_rel", "acquire", "release", default="sc")
    far = x.one_of(*SCOPES) not in ("cta", "cluster")

    def step(m: Machine, g: Threads) -> None:
        if m.watch is not None and far:
            m.watch.global_fence(m, g, kind != "release", kind != "acquire")

    return step


@operation("fence.proxy.async", "fence.mbarrier_init.release.cluster")
def proxy_fence(x: Operation) -> Callable:
    """Order generic accesses before those of the asynchronous proxy; only observers see the difference."""
    x.one_of("shared::cta", "shared::cluster", "global", default="")
    barriers_only = x.name.startswith("fence.mbarrier_init")

    def step(m: Machine, g: Threads) -> None:
        if m.watch is not None:
            m.watch.proxy_fence(m, g, barriers_only)

    return step
