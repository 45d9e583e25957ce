"""What one CTA works on, and what a thread of it needs at every KV block."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..common.dropout import Dropout
from ..common.heads import TileHeads
from ..common.rules import Rules
from ..common.sequence import Sequence
from ..common.softmax import OnlineSoftmax
from ..problem import Operands
from .config import Config
from .kv import KvStream
from .mma import Pieces
from .rows import Rows, Shared


class RowBlock(NamedTuple):
    """Rows first_row and on of some query heads of one sequence. split: which part of the keys, of `splits`.

    head: of the thread's rows, all of which are of one; it may not exist, see `TileHeads`.
    """

    call: Operands
    sequence: Sequence
    heads: TileHeads
    head: Int32
    first_row: Int32
    split: Int32 | int
    splits: Int32 | int
    thread: Int32


class Tiles(NamedTuple):
    """Shared memory. The output takes Q's place in the end; V's tiles may be K's."""

    q: cute.Tensor  # (tile_m, dim, 1)
    k: cute.Tensor  # (tile_n, dim, stages)
    v: cute.Tensor  # (tile_n, dim_v, stages)
    out: cute.Tensor  # (tile_m, dim_v, 1)


class Walk(NamedTuple):
    """What a thread needs at every KV block.

    mma: of S, whose threads are those with rows of their own; row_thread: which of them this one is or, of
    warps abreast, stands beside. mma_o: of O.
    """

    mma: cute.TiledMma
    mma_o: cute.TiledMma
    row_thread: Int32
    block: RowBlock
    stream: KvStream
    rules: Rules
    dropout: Dropout | None
    q: Pieces
    q_registers: list[cute.Tensor]
    k: Pieces
    v: Pieces
    acc_o: cute.Tensor  # (mma, M, dim_v / 8) fp32
    softmax: OnlineSoftmax


def rows_of_tile_in(config: Config, block: RowBlock, tensor: cute.Tensor, count: Int32) -> Rows:
    """A tile's rows of q or out, of which a sequence has `count`."""
    first_row, sequence = block.first_row, block.sequence
    if config.heads == 1:
        return cute.domain_offset((first_row, 0), sequence.q_rows_of(tensor, block.head))
    return Shared(sequence.q_heads_of(tensor), block.heads, first_row, count - 1, Int32(0))
