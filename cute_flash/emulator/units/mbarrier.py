"""mbarrier objects in shared memory.

A phase is complete when no arrival and no byte is outstanding; then the next one begins. Bytes may arrive
before they are expected. The object is opaque: its words are never "written", so reading them as data is an
uninitialised read.
"""

from __future__ import annotations

from ..base.errors import BarrierError
from ..core.events import Barrier
from ..core.machine import Machine, Part

MOST = (1 << 20) - 1  # arrivals, and bytes, of one phase
SIZE = 8


class MBarriers(Part):
    """All barriers of a wave, by (cta, address)."""

    def __init__(self, m: Machine):
        super().__init__(m)
        self.live: dict[tuple[int, int], Barrier] = {}

    def init(self, cta: int, address: int, count: int, warp: tuple[int, int]) -> None:
        """Create a barrier of `count` arrivals."""
        m = self.machine
        _check_address(m, address)
        if not 1 <= count <= MOST:
            raise BarrierError(f"mbarrier.init with {count} arrivals; allowed: 1 to {MOST}")
        if (cta, address) in self.live:
            raise BarrierError(f"mbarrier.init over {self.live[cta, address]!r}, which was not invalidated")
        barrier = self.live[cta, address] = Barrier(cta, address, len(self.live), count)
        if m.watch is not None:
            m.watch.mbarrier_init(m, warp, barrier)

    def invalidate(self, cta: int, address: int) -> None:
        """End a barrier's life."""
        self.find(cta, address)
        del self.live[cta, address]

    def find(self, cta: int, address: int) -> Barrier:
        """The barrier at an address; BarrierError where there is none."""
        barrier = self.live.get((cta, address))
        if barrier is None:
            _check_address(self.machine, address)
            raise BarrierError(f"no mbarrier was initialised at shared {address:#x} of CTA {cta}")
        return barrier

    def arrive(self, barrier: Barrier, count: int, warp: tuple[int, int] | None, lanes: int = 0) -> None:
        """`count` arrivals; warp: (cta, warp) that arrives, None for a unit of the hardware.

        lanes: those of the warp that arrive at the barrier in this instruction, as bits.
        """
        m = self.machine
        if m.watch is not None and warp is not None:
            m.watch.mbarrier_arrive(m, warp, barrier, lanes)
        if count < 1 or count > barrier.pending:
            raise BarrierError(f"{count} arrivals at {barrier!r}")
        barrier.pending -= count
        self._step(barrier)

    def await_one_more(self, barrier: Barrier) -> None:
        """The current phase also waits for an arrival that its count does not have."""
        barrier.pending += 1
        if barrier.pending > MOST:
            raise BarrierError(f"{barrier!r}: more than {MOST} arrivals")

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        """The current phase also waits for `nbytes` bytes."""
        barrier.bytes += nbytes
        self._check_bytes(barrier)

    def deliver(self, barrier: Barrier, nbytes: int) -> None:
        """`nbytes` bytes have arrived."""
        barrier.bytes -= nbytes
        self._check_bytes(barrier)
        self._step(barrier)

    def _check_bytes(self, barrier: Barrier) -> None:
        if abs(barrier.bytes) > MOST:
            raise BarrierError(f"{barrier!r}: more than {MOST} bytes")

    def _step(self, barrier: Barrier) -> None:
        """Begin the next phase if this one is complete."""
        if barrier.pending or barrier.bytes:
            return
        m = self.machine
        if m.watch is not None:
            m.watch.mbarrier_complete(m, barrier)
        barrier.phase += 1
        barrier.pending = barrier.expected
        m.wake(barrier.key)


def _check_address(m: Machine, address: int) -> None:
    if address % SIZE or not m.shared.base <= address <= m.shared.end - SIZE:
        limits = f"shared memory is [{m.shared.base}, {m.shared.end})"
        raise BarrierError(f"an mbarrier of {SIZE} bytes cannot lie at {address:#x}: {limits}")
