"""The order in which CTAs add to one tile of sums, where gradients must have the same bits in every run.

A warp adds the same part of a tile in every CTA. So every part has a number of its own in global memory,
which tells how many of those who may add to it are done: a warp waits until all who come before are, adds,
and leaves its own number. It is read with acquire and written with release semantics: who sees the number
adds after those that it counts.

Key tiles, and heads that share keys, come in the order of the grid. Nobody waits for a CTA that starts after
his own, so that a GPU with a place for one CTA is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..elementwise import maximum, where
from ..problem import Problem
from .blocks import Listed, Range, of_block, visits_from_keys
from .rules import Rules
from .sequence import Sequence

WARP = 32


@cute.jit
def wait(place: cute.Pointer, number: Int32):
    """Until `number` is at `place`. Every thread waits for itself, and orders what it does after it."""
    seen = cute.arch.load(place, Int32, sem="acquire", scope="gpu")
    while seen != number:
        seen = cute.arch.load(place, Int32, sem="acquire", scope="gpu")


@cute.jit
def pass_on(place: cute.Pointer, number: Int32):
    """Leave `number` at `place`, after all that the warp has added."""
    cute.arch.sync_warp()
    if cute.arch.thread_idx()[0] % WARP == 0:
        cute.arch.store(place, number, sem="release", scope="gpu")


class KeyTurns(NamedTuple):
    """The turns of the key tiles of one head, asked for by a thread; fields as in `visits_from_keys`."""

    problem: Problem
    tile: tuple[int, int]
    call: Any
    rules: Rules
    sequence: Sequence
    thread: Int32

    def before(self, key_tile: Int32, visits: Range | Listed, place: Int32) -> Int32:
        """How many key tiles, from the first on, are done when it is the turn of `key_tile`.

        Those up to the last before it that visits the rows at `place` of its own `visits`; 0 where none does.
        """
        tile_m, tile_n = self.tile
        if self.problem.block_size:
            block_q, block_k = self.problem.block_size
            blocks = of_block(self.call.block_turns, self.rules, key_tile * tile_n // block_k)
            tiles = block_k // tile_n
            return where(key_tile % tiles == 0, blocks[place // (block_q // tile_m)] * tiles, key_tile)
        if self.rules.mask is None:
            return key_tile
        return _last_that(self._visitor(visits.block(place)), key_tile, self.thread % WARP)

    def _visitor(self, block: Int32) -> Callable:
        """key tile -> whether it visits this block of rows."""
        given = self.problem, self.tile, self.call, self.rules, self.sequence
        return lambda key_tile: visits_from_keys(*given, key_tile * self.tile[1]).takes(block)


@cute.jit
def _last_that(visits: cutlass.Constexpr[Callable], tiles: Int32, lane: Int32):
    """1 + the last of `tiles` tiles that visits, 0 where none does. Each lane asks another tile."""
    found = Int32(0)
    while (found == 0) & (tiles > 0):
        # Of the lanes that are left over, all ask the first tile.
        mine = maximum(tiles - lane, 1)
        found = Int32(cute.arch.warp_redux_sync(where(visits(mine - 1), mine, 0), "max"))
        tiles -= WARP
    return found
