"""Whether CTAs add to sums as they come, or in turns, so that gradients have the same bits in every run.

Both answer the calls around what is added: dQ of a visit, which one thread of the store role adds, and in the
end dK and dV where heads share them, which one thread of each compute warpgroup does. All threads of its warp
call this.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ...common.blocks import Listed, Range
from ...common.key_block import KeyBlock
from ...common.rules import Rules
from ...common.turns import KeyTurns, pass_on, wait
from ...problem import Problem


class AsTheyCome:
    """No order."""

    ordered = False

    def wait_q(self, block: KeyBlock, rules: Rules, visits: Range | Listed, place: Int32, row: Int32) -> None:
        """Before dQ of the visit at `place` is added, to rows from scratch row `row` on."""

    def pass_q(self, block: KeyBlock, row: Int32) -> None:
        """After it."""

    def wait_k(self, block: KeyBlock, row: Int32, part: Int32) -> None:
        """Before dK or dV, part 0 or 1, whose first scratch row is `row`."""

    def pass_k(self, block: KeyBlock, row: Int32, part: Int32) -> None:
        """After it."""


class InTurns(NamedTuple):
    """In the order of the grid, each when the one before is complete. tile: rows of Q and of K in one."""

    problem: Problem
    tile: tuple[int, int]
    ordered: bool = True

    def wait_q(self, block: KeyBlock, rules: Rules, visits: Range | Listed, place: Int32, row: Int32) -> None:
        """Until all key tiles before this one have added."""
        thread = cute.arch.thread_idx()[0]
        keys = KeyTurns(self.problem, self.tile, block.call, rules, block.sequence, thread)
        wait(self._of_q(block, row), Int32(keys.before(self._key_tile(block), visits, place)))

    def pass_q(self, block: KeyBlock, row: Int32) -> None:
        """Let the next key tile add."""
        pass_on(self._of_q(block, row), self._key_tile(block) + 1)

    def wait_k(self, block: KeyBlock, row: Int32, part: Int32) -> None:
        """Until all heads before this one have added, or have nothing to add."""
        wait(self._of_k(block, row, part), block.member)

    def pass_k(self, block: KeyBlock, row: Int32, part: Int32) -> None:
        """Let the next head add."""
        pass_on(self._of_k(block, row, part), block.member + 1)

    def _key_tile(self, block: KeyBlock) -> Int32:
        return block.first_key // self.tile[1]

    def _of_q(self, block: KeyBlock, row: Int32) -> cute.Pointer:
        return block.call.turns_q[block.head, None].iterator + row

    def _of_k(self, block: KeyBlock, row: Int32, part: Int32) -> cute.Pointer:
        return block.call.turns_k[block.kv_head, None].iterator + (row + part)
