"""Gradients' accumulators, as main kernels add to them and the postprocess reads them.

A tile of some rows is rows * columns neighbouring numbers: number e of thread t's accumulator lies at
e * threads + t, so that a warp's addition is 128 neighbouring bytes, and no lane's meets another's.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32


class SummedTile(NamedTuple):
    """One tile of the accumulator, seen by one thread. place: of its first number."""

    place: cute.Pointer
    threads: int

    @staticmethod
    def of(sums: cute.Tensor, head: Int32, row: Int32, thread: Int32, threads: int) -> SummedTile:
        """The tile that begins at scratch row `row`."""
        return SummedTile(sums[head, row, None].iterator + thread, threads)

    def read(self, acc: cute.Tensor) -> None:
        """Fill an accumulator."""
        for e in range(cute.size(acc)):
            acc[e] = (self.place + e * self.threads).load()

    def add(self, acc: cute.Tensor) -> None:
        """Add an accumulator, number by number."""
        for e in range(cute.size(acc)):
            place = self.place + e * self.threads
            cute.arch.red(place, acc[e], op="add", dtype="f32", sem="relaxed", scope="gpu")
