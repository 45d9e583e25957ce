"""A tile of K in parts of 64 columns: in which order they arrive, and who reads them last.

    range 0   what is not V           whoever computes the tile's scores
    range 1   the first half of V     warpgroup 0, as V
    range 2   the second half         warpgroup 1, as V

The scores of visit i are warpgroup i % 2's. What is not V comes first, as its place is free before all
others; then its own half, which it frees itself. Parts arrive one by one; ranges are freed.
"""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32

from ...problem import Problem
from .config import PART

RANGES, NOT_V = 3, 0


class Range(NamedTuple):
    """Parts `first` and on, `count` of them."""

    number: Int32 | int
    first: Int32 | int
    count: int


class Parts(NamedTuple):
    """How many: in each half of V, and of what is not V."""

    half: int
    rest: int

    @staticmethod
    def of(problem: Problem) -> Parts:
        half = problem.head_dim_v // PART // 2
        return Parts(half, problem.head_dim // PART - 2 * half)

    @property
    def count(self) -> int:
        """Of a tile."""
        return 2 * self.half + self.rest

    def ranges(self, warpgroup: Int32) -> tuple[Range, ...]:
        """In the order in which they come for a warpgroup's own visit."""
        own, other = (Range(1 + w, w * self.half, self.half) for w in (warpgroup, 1 - warpgroup))
        return Range(NOT_V, 2 * self.half, self.rest), own, other
