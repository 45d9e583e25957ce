"""From the clocks of a CTA to those of a launch: CTAs on all SMs, as these come free.

A CTA's clocks are known for some numbers of KV tiles; between them they are interpolated, beyond them the
last two go on in a line. Every CTA of a grid has its own number: under a causal mask a tile of rows sees the
tiles of keys up to its last row.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A call's sizes."""

    batch: int
    rows: int
    keys: int
    heads: int
    heads_kv: int
    dims: tuple[int, int]
    causal: bool

    @property
    def flops(self) -> float:
        """Of both products; under a causal mask of the half, as tables count."""
        every = 2 * self.batch * self.heads * self.rows * self.keys * sum(self.dims)
        return every / 2 if self.causal else every


def clocks_of(points: dict[int, float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of numbers of KV tiles from those that were run."""
    known = sorted(points)
    values = [points[n] for n in known]
    slope = (values[-1] - values[-2]) / (known[-1] - known[-2])

    def clocks(tiles: np.ndarray) -> np.ndarray:
        beyond = values[-1] + (tiles - known[-1]) * slope
        return np.where(tiles > known[-1], beyond, np.interp(tiles, known, values))

    return clocks


def tiles_of(shape: Shape, rows: int, keys: int, packed: int) -> np.ndarray:
    """How many KV tiles each tile of rows of one head sees. rows: of packed queries, keys: of a tile."""
    queries = rows // packed
    last = np.minimum(np.arange(-(-shape.rows // queries)) * queries + queries, shape.rows)
    seen = last + (shape.keys - shape.rows) if shape.causal else np.full_like(last, shape.keys)
    return -(-np.clip(seen, 0, shape.keys) // keys)


def query_tiles_of(shape: Shape, rows: int, keys: int) -> np.ndarray:
    """How many tiles of rows each block of keys of one head is seen by."""
    first = np.arange(-(-shape.keys // keys)) * keys - (shape.keys - shape.rows)
    skipped = np.clip(first, 0, shape.rows) // rows if shape.causal else np.zeros_like(first)
    return -(-shape.rows // rows) - skipped


def makespan(durations: Sequence[float], places: int) -> float:
    """When the last one ends, each begun where a place comes free first."""
    free = [0.0] * places
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def launch(per_head: np.ndarray, heads: int, places: int, longest_first: bool) -> float:
    """Clocks until all tiles of rows are done. per_head: of each tile of one of `heads` heads."""
    every = np.tile(per_head, heads)
    if longest_first:
        every = np.sort(every)[::-1]
    return makespan(every.tolist(), places)
