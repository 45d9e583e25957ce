"""The memory that roles of a latent kernel's CTA share, beyond what those for other heads do."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from ...common.memory import Tiles
from ..config import TILE_M
from .config import ROWS


class Memory(NamedTuple):
    """As for other heads; tiles: k and v are parts.

    q_parts: Q (64, columns, parts). p: (64, keys, 1). maxima: (128, 2) fp32, what two threads that share a
    row tell each other, in turns.
    """

    tiles: Tiles
    factors: cute.Tensor
    address: cute.Pointer
    q_parts: cute.Tensor
    p: cute.Tensor
    maxima: cute.Tensor
    tensor: cute.Pointer | None = None

    def looked_up(self) -> Memory:
        """With tensor memory's place, from its word."""
        return self._replace(tensor=cute.arch.retrieve_tmem_ptr(Float32, 16, self.address))


def row_of(thread: Int32) -> Int32:
    """Which of the CTA's rows is that of a warpgroup's thread."""
    return thread % ROWS


def part_of(thread: Int32) -> Int32:
    """Which half of its row's columns a thread has."""
    return thread // ROWS


def other(thread: Int32) -> Int32:
    """Who has the other half."""
    return (thread + ROWS) % TILE_M
