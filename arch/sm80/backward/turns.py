"""Whether CTAs add to sums as they come, or in turns, so that gradients have the same bits in every run.

Both answer the main kernel's calls around what it adds: to dQ at a visit, and in the end to dK and dV where
heads share them. The sums' layout (common/sums.py) gives each warp the same numbers of a tile in every CTA.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ...common.order import hidden_zero
from ...common.turns import WARP, KeyTurns, pass_on, wait
from .job import KeyBlock, Walk


class AsTheyCome:
    """No order."""

    def turn_q(self, walk: Walk, place: Int32) -> None:
        """What `wait_q` waits for, where it is to be found out before dQ's product."""

    def wait_q(self, walk: Walk, place: Int32, row: Int32, turn: None) -> None:
        """Before dQ of the visit at `place` is added, to rows from scratch row `row` on."""

    def pass_q(self, walk: Walk, place: Int32, row: Int32) -> None:
        """After it, as late as it costs nothing."""

    def wait_k(self, block: KeyBlock, row: Int32) -> None:
        """Before dK and dV. row: their first scratch row."""

    def pass_k(self, block: KeyBlock, row: Int32) -> None:
        """After them."""


class InTurns(NamedTuple):
    """In the order of the grid. tile: rows of a query and of a key tile.

    early: a turn is found out before dQ's product, whose accumulator leaves no registers for it.
    """

    tile: tuple[int, int]
    early: bool

    def turn_q(self, walk: Walk, place: Int32) -> Int32 | None:
        """What `wait_q` waits for, if it is found out early."""
        return self._due(walk, place) if self.early else None

    def _due(self, walk: Walk, place: Int32) -> Int32:
        """How many key tiles are done when it is this one's turn."""
        block, visits = walk.block, walk.stream.visits
        thread = block.thread + _zero(place)
        keys = KeyTurns(walk.problem, self.tile, block.call, walk.rules, block.sequence, thread)
        return Int32(keys.before(self._key_tile(block, place), visits, place))

    def wait_q(self, walk: Walk, place: Int32, row: Int32, turn: Int32 | None) -> None:
        """Until all key tiles before this one have added to the query tile."""
        wait(self._of_q(walk.block, place, row), self._due(walk, place) if turn is None else turn)

    def pass_q(self, walk: Walk, place: Int32, row: Int32) -> None:
        """Let the next key tile add: what was added has had dK's product to arrive in."""
        block = walk.block
        pass_on(self._of_q(block, place, row), self._key_tile(block, place) + 1)

    def wait_k(self, block: KeyBlock, row: Int32) -> None:
        """Until all heads before this one have added, or have nothing to add."""
        wait(self._of_warp(block.call.turns_k, block.kv_head, row, block.thread), block.member)

    def pass_k(self, block: KeyBlock, row: Int32) -> None:
        """Let the next head add."""
        pass_on(self._of_warp(block.call.turns_k, block.kv_head, row, block.thread), block.member + 1)

    def _key_tile(self, block: KeyBlock, place: Int32) -> Int32:
        return (block.first_key + _zero(place)) // self.tile[1]

    def _of_q(self, block: KeyBlock, place: Int32, row: Int32) -> cute.Pointer:
        zero = _zero(place)
        return self._of_warp(block.call.turns_q, block.head + zero, row, block.thread + zero)

    def _of_warp(self, turns: cute.Tensor, head: Int32, row: Int32, thread: Int32) -> cute.Pointer:
        return turns[head, None].iterator + (row + thread // WARP)


def _zero(place: Int32) -> Int32:
    """`hidden_zero` of a place, which has 64 bits where a mask's bounds have."""
    return hidden_zero(Int32(place))
