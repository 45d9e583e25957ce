"""Checkers and counters that look on from outside; a run without them pays nothing.

An Observer's hooks are called before the access or event they name. Threads and addresses are those of one
instruction; m.at is its step. `Options(races=True)` attaches a RaceDetector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .events import Barrier, Columns, Copy, Order, Rows, Span, Unit
    from .geometry import Geometry
    from .state import Threads


class Observer:
    """Base class: every hook does nothing."""

    def begin(self, m: Geometry) -> None:
        """A wave of CTAs starts."""

    def step(self, m: Geometry, g: Threads) -> None:
        """Step m.at is about to run on `g`. Overriding this one makes every instruction slower."""

    def shared_read(self, m: Geometry, g: Threads, address: np.ndarray, size: int) -> None:
        """Each thread reads `size` bytes of shared memory."""

    def shared_write(
        self, m: Geometry, g: Threads, address: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Each thread writes values[k] (count elements) to shared memory."""

    def global_read(self, m: Geometry, g: Threads, address: np.ndarray, size: int, order: Order) -> None:
        """Each thread reads `size` bytes of global memory."""

    def global_write(
        self, m: Geometry, g: Threads, address: np.ndarray, values: np.ndarray, order: Order
    ) -> None:
        """Each thread writes values[k] (count elements) to global memory, or updates it."""

    def global_fence(self, m: Geometry, g: Threads, acquire: bool, release: bool) -> None:
        """Each thread executes a fence at the scope of the GPU or the system."""

    def bulk_read(self, m: Geometry, warp: tuple[int, int], barrier: Barrier, rows: Rows) -> None:
        """A copy issued by (cta, warp) begins to read global memory.

        It is over when the barrier's current phase is.
        """

    def bulk_write(self, m: Geometry, unit: Unit, rows: Rows, order: Order) -> None:
        """A unit begins to write global memory, or to update it."""

    def bulk_written(self, m: Geometry, warp: tuple[int, int], unit: Unit) -> None:
        """(cta, warp) has waited until a unit's steps up to unit.epoch have written global memory."""

    def copy_issue(self, m: Geometry, g: Threads, copy: Copy) -> None:
        """Each thread starts an asynchronous copy into shared memory."""

    def copy_done(self, m: Geometry, copy: Copy) -> None:
        """The threads of `copy` have waited for it."""

    def copy_tracked(self, m: Geometry, unit: Unit, copy: Copy) -> None:
        """From now on an mbarrier tells when these copies are over: the unit arrives at it then."""

    def async_read(self, m: Geometry, unit: Unit, cta: int, address: np.ndarray, size: int) -> None:
        """A unit begins to read `size` bytes at each address of `cta`'s shared memory (async proxy)."""

    def async_write(self, m: Geometry, warp: tuple[int, int], barrier: Barrier, span: Span) -> None:
        """A copy issued by (cta, warp) begins to write a part of shared memory.

        It is over when the barrier's current phase is.
        """

    def unit_done(self, m: Geometry, warp: tuple[int, int], unit: Unit) -> None:
        """(cta, warp) has waited for a unit's steps up to unit.epoch."""

    def proxy_fence(self, m: Geometry, g: Threads, barriers_only: bool) -> None:
        """Each warp orders its generic accesses, and those it knows of, before asynchronous ones.

        barriers_only: its initialisations of mbarriers only.
        """

    def unit_commit(self, m: Geometry, unit: Unit) -> None:
        """A step of a unit ends: what its issuer knows to be over now is over when the step is."""

    def unit_arrive(self, m: Geometry, unit: Unit, barrier: Barrier) -> None:
        """A unit arrives at a barrier when its steps up to unit.epoch are over."""

    def tensor_access(self, m: Geometry, warp: tuple[int, int], columns: Columns, write: bool) -> None:
        """(cta, warp) loads from tensor memory, or begins to store to it."""

    def tensor_stored(self, m: Geometry, g: Threads) -> None:
        """Each warp has waited for its stores to tensor memory."""

    def tensor_loaded(self, m: Geometry, g: Threads) -> None:
        """Each warp has waited for its loads from tensor memory."""

    def tensor_fence(self, m: Geometry, g: Threads, before: bool) -> None:
        """Each warp executes tcgen05.fence, ::before_thread_sync or ::after_thread_sync."""

    def tensor_work(self, m: Geometry, unit: Unit, columns: Columns, write: bool) -> None:
        """A unit begins to read tensor memory, or to write it."""

    def tensor_free(self, m: Geometry, warp: tuple[int, int], columns: Columns) -> None:
        """(cta, warp) deallocates columns."""

    def mbarrier_init(self, m: Geometry, warp: tuple[int, int], barrier: Barrier) -> None:
        """(cta, warp) initialises a barrier."""

    def mbarrier_use(self, m: Geometry, warp: tuple[int, int], barrier: Barrier, by_unit: bool) -> None:
        """(cta, warp) is about to use a barrier, or to let a copy or a product signal it (by_unit)."""

    def mbarrier_arrive(self, m: Geometry, warp: tuple[int, int], barrier: Barrier, lanes: int) -> None:
        """Some lanes of (cta, warp), as bits, arrive at a barrier; called for each of them."""

    def mbarrier_arrive_relaxed(self, m: Geometry, warp: tuple[int, int], barrier: Barrier) -> None:
        """A lane of (cta, warp) arrives at a barrier and releases nothing."""

    def mbarrier_complete(self, m: Geometry, barrier: Barrier) -> None:
        """A barrier's phase is complete."""

    def mbarrier_wait(self, m: Geometry, warp: tuple[int, int], barrier: Barrier) -> None:
        """(cta, warp) has seen that the phase before the barrier's current one is complete."""

    def warp_meet(self, m: Geometry, g: Threads) -> None:
        """The lanes of each warp leave bar.warp.sync."""

    def cluster_arrive(self, m: Geometry, g: Threads, release: bool) -> None:
        """Each warp arrives at its cluster's barrier."""

    def cluster_wait(self, m: Geometry, g: Threads) -> None:
        """Each warp leaves its cluster's barrier."""

    def barrier_arrive(self, m: Geometry, g: Threads, number: np.ndarray) -> None:
        """Each warp arrives at a named barrier."""

    def barrier_complete(self, m: Geometry, complete: np.ndarray) -> None:
        """Named barriers complete: bool (ctas, 16). NamedBarriers still holds who is present, who waits."""


class Observers(Observer):
    """Several observers as one: each hook calls those that have one of their own.

    every_step: whether somebody wants to hear of every step.
    """

    def __init__(self, members: tuple[Observer, ...]):
        for name in (name for name in vars(Observer) if not name.startswith("_")):
            calls = [getattr(member, name) for member in members if _overrides(member, name)]
            setattr(self, name, calls[0] if len(calls) == 1 else _in_turn(calls))
        self.every_step = any(_overrides(member, "step") for member in members)


def _overrides(member: Observer, name: str) -> bool:
    return getattr(getattr(member, name), "__func__", None) is not getattr(Observer, name)


def _in_turn(calls: list[Callable]) -> Callable:
    def hook(*args, **kwargs) -> None:
        for call in calls:
            call(*args, **kwargs)

    return hook
