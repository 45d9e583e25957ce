"""The load role in FP8: as for 16 bits; with Q, K and dO come their columns, on the same barriers."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from ...common.key_block import KeyBlock
from ...common.operand import HeadRows
from ..backward.job import Tiles
from ..backward.load import Load
from ..forward.load import EVICT_FIRST, EVICT_LAST


class QuantizedLoad(Load):
    """The same order."""

    def bring_k(self, block: KeyBlock, tiles: Tiles, slot) -> None:
        super().bring_k(block, tiles, slot)
        place = block.kv_head, block.scratch_k(self.problem)
        self.columns(block, "k_columns", place, tiles, slot)

    def bring_q(self, block: KeyBlock, q: HeadRows, row: Int32, tiles: Tiles, slot) -> None:
        super().bring_q(block, q, row, tiles, slot)
        place = block.head, block.scratch_q(self.problem) + row
        self.columns(block, "q_columns", place, tiles, slot)

    def bring_grad_out(self, block: KeyBlock, grad_out: HeadRows, row: Int32, tiles: Tiles, slot) -> None:
        super().bring_grad_out(block, grad_out, row, tiles, slot)
        place = block.head, block.scratch_q(self.problem) + row
        self.columns(block, "grad_out_columns", place, tiles, slot)

    def columns(
        self, block: KeyBlock, name: str, place: tuple[Int32, Int32], tiles: Tiles, slot
    ) -> None:
        """Begin copying a tile by columns. place: the head and its first scratch row."""
        head, row = place
        operand, mapped, into = (getattr(of, name) for of in (self.brought, block.maps, tiles.moved))
        rows = operand.head_rows(mapped, block.sequence.batch, head, Int32(0), Int32(0))
        rows = rows._replace(coordinates=cute.domain_offset((0, row), rows.coordinates))
        once = name == "k_columns"
        index, policy = (0, EVICT_FIRST) if once else (slot.index, EVICT_LAST)
        self.copy(operand, rows, Int32(0), into[None, None, index], slot, policy)
