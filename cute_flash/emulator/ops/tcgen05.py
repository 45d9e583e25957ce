"""tcgen05 without products: allocation, loads and stores of registers, waits and fences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import TensorMemoryError
from ..base.formats import CANONICAL_NAN
from ..core.code import Step
from ..core.engine import Engine
from ..core.engine import Operation as Pending
from ..core.events import Columns
from ..core.state import LANES
from ..translate.translation import Operation, operation
from ..units.tensor_memory import COLUMNS, POISON, TensorMemory
from .floating import extreme
from .memory import Access, write

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads
    from ..ptx.parse import Instruction


def cta_group(x: Operation) -> int:
    """Consume .cta_group::1 or ::2, which must be the same for all tcgen05 instructions of a kernel."""
    group = int(x.one_of("cta_group::1", "cta_group::2")[-1])
    if x.translation.cta_group not in (None, group):
        raise x.unmodelled(f".cta_group::{group} in a kernel that uses the other one, too,")
    x.translation.cta_group = group
    return group


def uniform(m: Machine, g: Threads, row: int, what: str) -> np.ndarray:
    """One value per warp of a set of whole warps, int64 (warps,); the lanes must agree."""
    words = m.rows["u32"][row][g.index].reshape(-1, LANES)
    if (words != words[:, :1]).any():
        k = int(np.flatnonzero((words != words[:, :1]).any(axis=1))[0])
        raise m.warp_fault(TensorMemoryError, g, k, f"lanes of one warp give different {what}")
    return words[:, 0].astype(np.int64)


def one_warp(m: Machine, g: Threads, k: int, lanes: slice) -> Threads:
    """Some lanes of warp number k of a set."""
    mask = np.zeros_like(g.mask)
    mask[g.warp_at[k], g.cta_at[k], lanes] = True
    return m.sets.of(mask)


# Allocation.


@operation("tcgen05.alloc")
def alloc(x: Operation) -> Step:
    """Allocate columns and write their address to shared memory; wait while there is no room."""
    group = cta_group(x)
    x.one_of("sync")
    x.one_of("aligned")
    space = x.one_of("shared::cta", default="")
    x.type("b32")
    access, count = Access(x, 0, space and "shared", 4), x.source(1, "u32")

    def step(m: Machine, g: Threads, here: int) -> list[tuple[int, Threads]]:
        g, going = m.whole_warps(g, here)
        if g is None:
            return going
        address = access.of(m, g).reshape(-1, LANES)
        for k, columns in enumerate(uniform(m, g, count, "numbers of columns").tolist()):
            cta, warp = int(g.cta_at[k]), int(g.warp_at[k])
            if group == 2 and m.cluster % 2:
                raise m.warp_fault(TensorMemoryError, g, k, "this CTA has no peer: its cluster has odd size")
            if group == 2:
                base = m.part(TensorMemory).allocate_pair(cta, warp, columns)
            else:
                base = m.part(TensorMemory).allocate(cta, columns)
            if base is None:
                m.park(here, one_warp(m, g, k, slice(None)), m.part(TensorMemory).key(cta))
                continue
            value = np.array([[base]], np.uint32)
            write(m, one_warp(m, g, k, slice(1)), access.space, address[k, :1], value)
            going.append((here + 1, one_warp(m, g, k, slice(None))))
        return going

    return x.control(step)


@operation("tcgen05.dealloc")
def dealloc(x: Operation) -> Step:
    """Give an allocation back."""
    cta_group(x)
    x.one_of("sync")
    x.one_of("aligned")
    x.type("b32")
    address, count = x.source(0, "u32"), x.source(1, "u32")

    def step(m: Machine, g: Threads) -> None:
        addresses = uniform(m, g, address, "addresses").tolist()
        for k, columns in enumerate(uniform(m, g, count, "numbers of columns").tolist()):
            cta, warp = int(g.cta_at[k]), int(g.warp_at[k])
            freed = m.part(TensorMemory).release(cta, addresses[k], columns)
            if m.watch is not None:
                m.watch.tensor_free(m, (cta, warp), freed)

    return x.converged(step)


@operation("tcgen05.relinquish_alloc_permit")
def relinquish(x: Operation) -> Step:
    """The CTA will not allocate any more."""
    cta_group(x)
    x.one_of("sync")
    x.one_of("aligned")

    def step(m: Machine, g: Threads) -> None:
        for cta in g.cta_at.tolist():
            m.part(TensorMemory).relinquished[cta] = True

    return x.converged(step)


# Loads and stores.


class Reach(NamedTuple):
    """What one ld or st of a warp touches.

    lane, column: offsets of register word (register, half, lane) from the start, int64 (registers, halves,
    32); halves is 2 where 16-bit halves are packed. lanes: 32 or 16; windows: (offset, columns) touched.
    """

    lane: np.ndarray
    column: np.ndarray
    lanes: int
    windows: tuple[tuple[int, int], ...]


# shape -> (registers of x1, columns of x1)
SHAPES = {"32x32b": (1, 1), "16x64b": (1, 2), "16x128b": (2, 4), "16x256b": (4, 8), "16x32bx2": (1, 1)}


@lru_cache(maxsize=256)
def reach(shape: str, times: int, split: int, packed: bool) -> Reach:
    """Which word each register of each lane is (PTX ISA, matrix fragments of tcgen05.ld and .st)."""
    per, width = SHAPES[shape]
    j, lane = np.arange(per * times)[:, None], np.arange(LANES)[None, :]
    zero = np.zeros((per * times, LANES), np.int64)
    row, column = {
        "32x32b": (lane + zero, j + zero),
        "16x64b": (lane // 4 + 8 * (lane % 2) + zero, 2 * j + lane // 2 % 2),
        "16x128b": (lane // 4 + 8 * (j % 2), 4 * (j // 2) + lane % 4),
        "16x256b": (lane // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2),
        "16x32bx2": (lane % 16 + zero, j + zero),
    }[shape]
    # Packed: two neighbouring columns take the place of one.
    halves = 1 + packed
    column = halves * column[:, None, :] + np.arange(halves)[None, :, None]
    span, windows = halves * width * times, ((0, halves * width * times),)
    if shape == "16x32bx2":
        column = column + np.where(lane < 16, 0, split)[None]
        windows = ((0, span), (split, span))
    row = np.broadcast_to(row[:, None, :], column.shape)
    return Reach(row, column, 32 if shape == "32x32b" else 16, windows)


def _form(x: Operation, half: str, split: int | None) -> Reach:
    """Consume the modifiers of ld or st.

    half: the one that packs or unpacks, empty where none may. split: the operand that holds the second half's
    offset.
    """
    x.one_of("sync")
    x.one_of("aligned")
    shape = x.one_of(*SHAPES)
    times = int(x.one_of(*(f"x{1 << k}" for k in range(8)))[1:])
    packed = bool(half) and x.flag(half)
    x.type("b32")
    if SHAPES[shape][0] * times > 128:
        raise x.unmodelled(f".{shape}.x{times}")
    offset = x.integer(split) if shape == "16x32bx2" else 0
    return reach(shape, times, offset, packed)


def _registers(x: Operation, position: int, form: Reach) -> tuple:
    items = x.vector(position)
    if len(items) != len(form.lane):
        raise x.unmodelled(f"{len(items)} registers where the shape has {len(form.lane)}")
    return items


class _Target:
    """The address operand of ld and st."""

    def __init__(self, x: Operation, position: int, form: Reach, write: bool):
        self.write = write
        self.row, view, self.offset = x.address(position)
        if view != "u32":
            raise x.unmodelled("an address that is not a 32-bit register")
        self.form, self.name = form, x.name

    def columns(self, m: Machine, g: Threads) -> tuple[np.ndarray, np.ndarray]:
        """(first lane, first column) of each warp, checked and told to observers."""
        address = uniform(m, g, self.row, "addresses") + self.offset
        lane, column = m.part(TensorMemory).starts(g, address, self.form.lanes)
        for k, (cta, first) in enumerate(zip(g.cta_at.tolist(), lane.tolist(), strict=True)):
            lanes = slice(first, first + self.form.lanes)
            for offset, count in self.form.windows:
                columns = Columns(cta, lanes, int(column[k]) + offset, count)
                m.part(TensorMemory).check_columns(cta, columns.first, count, self.name)
                if m.watch is not None:
                    m.watch.tensor_access(m, (cta, int(g.warp_at[k])), columns, self.write)
        return lane, column

    def index(self, g: Threads, lane: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Positions in the raveled words: (registers, halves, warps, 32)."""
        start = (g.cta_at * 128 + lane) * COLUMNS + column
        return (self.form.lane * COLUMNS + self.form.column)[:, :, None, :] + start[:, None]


def _load(m: Machine, g: Threads, target: _Target) -> np.ndarray:
    """The register words that a load brings: (registers, warps, 32)."""
    lane, column = target.columns(m, g)
    index = target.index(g, lane, column)
    tensor = m.part(TensorMemory)
    if tensor.strict:
        flags = tensor.written.reshape(-1)[index]
        if not flags.all():
            raise _unwritten(m, int(index[~flags].min()))
    words = tensor.words.reshape(-1)[index]
    if words.shape[1] == 2:
        return words[:, 0] & np.uint32(0xFFFF) | words[:, 1] << np.uint32(16)
    return words[:, 0]


@operation("tcgen05.ld")
def load(x: Operation) -> Step:
    """Registers from tensor memory, at once: reading the registers waits for them."""
    form = _form(x, "pack::16b", 2)
    dests = np.array([x.dest_of(item, "u32") for item in _registers(x, 0, form)])
    target = _Target(x, 1, form, False)
    return x.converged(lambda m, g: g.scatter(m.banks[32], dests, _load(m, g, target)))


@operation("tcgen05.ld.red")
def load_reduced(x: Operation) -> Step:
    """A load, and the smallest or largest of the words that each thread gets (sm_103a, sm_110a)."""
    name = x.one_of("min", "max")
    magnitude, nan = x.flag("abs"), x.flag("NaN")
    kind = next((m for m in x.modifiers if m in ("f32", "u32", "s32")), "b32")
    x.modifiers = ["b32" if m == kind else m for m in x.modifiers]
    if "32x32b" not in x.modifiers or kind == "b32" or (kind != "f32" and (magnitude or nan)):
        raise x.unmodelled("this reduction")
    form = _form(x, "", 3)
    if len(form.lane) < 2:
        raise x.unmodelled("a reduction of x1")
    dests = np.array([x.dest_of(item, "u32") for item in _registers(x, 0, form)])
    d, target = x.dest(1, kind), _Target(x, 2, form, False)
    view = {"f32": np.float32, "u32": np.uint32, "s32": np.int32}[kind]

    def step(m: Machine, g: Threads) -> None:
        words = _load(m, g, target)
        values = words.view(view)
        if magnitude:
            values = np.abs(values)
        result = values[0]
        for other in values[1:]:
            result = extreme(name, result, other) if kind == "f32" else _EXTREMES[name](result, other)
        if nan:
            result = np.where(np.isnan(values).any(axis=0), _NAN, result)
        g.scatter(m.banks[32], dests, words)
        m.rows[kind][d][g.index] = result.reshape(g.shape)

    return x.converged(step)


_EXTREMES = {"min": np.minimum, "max": np.maximum}
_NAN = np.array(CANONICAL_NAN[32], np.uint32).view(np.float32)


def _unwritten(m: Machine, position: int) -> Exception:
    cta, rest = divmod(position, 128 * COLUMNS)
    lane, column = divmod(rest, COLUMNS)
    return m.part(TensorMemory).unwritten("tcgen05.ld", cta, lane, column)


@dataclass(eq=False)
class Store(Pending):
    """A tcgen05.st of one warp on its way; warp: (cta, warp); column: the first one, count: how many."""

    index: np.ndarray
    words: np.ndarray
    warp: tuple[int, int]
    column: int
    count: int
    where: Instruction

    kind = "product"

    @property
    def queue(self) -> tuple:
        return "tensor stores", *self.warp

    def land(self, m: Machine) -> None:
        tensor = m.part(TensorMemory)
        tensor.check_columns(self.warp[0], self.column, self.count, "tcgen05.st")
        tensor.words.reshape(-1)[self.index] = self.words
        tensor.written.reshape(-1)[self.index] = True


@operation("tcgen05.st")
def store(x: Operation) -> Step:
    """Registers to tensor memory; done when wait::st says so, and nothing is there until then.

    Undefined registers may be stored, as poison: NVIDIA's fp8 attention stores a block of which it uses half.
    """
    form = _form(x, "unpack::16b", 1)
    last = x.count() - 1
    sources = np.array([x.bank_row(item, "u32") for item in _registers(x, last, form)])
    x.only_moves()
    target = _Target(x, 0, form, True)
    where = x.instruction

    def step(m: Machine, g: Threads) -> None:
        lane, column = target.columns(m, g)
        index = target.index(g, lane, column)
        words = g.gather(m.banks[32], sources)[:, None]
        if index.shape[1] == 2:
            words = np.concatenate([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=1)
        count = form.windows[0][1]
        for k, warp in enumerate(zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True)):
            pending = Store(index[:, :, k], words[:, :, k], warp, int(column[k]), count, where)
            m.part(TensorMemory).stores.setdefault(warp, []).append(pending)
            m.part(Engine).issue(pending)
            if not pending.landed:
                m.part(TensorMemory).words.reshape(-1)[pending.index] = POISON
                m.part(TensorMemory).written.reshape(-1)[pending.index] = False

    return x.converged(step)


@operation("tcgen05.wait::ld", "tcgen05.wait::st")
def wait(x: Operation) -> Step:
    """Wait for the warp's stores; loads are never late (see load)."""
    x.one_of("sync")
    x.one_of("aligned")
    stores = x.name.endswith("st")

    def step(m: Machine, g: Threads) -> None:
        if not stores:
            if m.watch is not None:
                m.watch.tensor_loaded(m, g)
            return
        for cta, warp in zip(g.cta_at.tolist(), g.warp_at.tolist(), strict=True):
            for pending in m.part(TensorMemory).stores.pop((cta, warp), ()):
                m.part(Engine).finish(pending)
        if m.watch is not None:
            m.watch.tensor_stored(m, g)

    return x.converged(step)


@operation("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(x: Operation) -> Callable:
    """Orders the thread's tcgen05 instructions around synchronisation; program order does that here."""
    before = x.name.endswith("before_thread_sync")

    def step(m: Machine, g: Threads) -> None:
        if m.watch is not None:
            m.watch.tensor_fence(m, g, before)

    return step
