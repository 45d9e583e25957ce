"""What one CTA works on, and what a thread of it needs at every KV block."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..common.dropout import Dropout
from ..common.rules import Rules
from ..common.sequence import Sequence
from ..common.softmax import OnlineSoftmax
from ..problem import Operands
from .kv import KvStream
from .mma import Pieces


class RowBlock(NamedTuple):
    """Rows first_row and on of one query head of one sequence. split: which part of the keys, of `splits`."""

    call: Operands
    sequence: Sequence
    head: Int32
    kv_head: Int32
    first_row: Int32
    split: Int32 | int
    splits: Int32 | int
    thread: Int32


class Tiles(NamedTuple):
    """Shared memory. The output takes Q's place in the end."""

    q: cute.Tensor  # (tile_m, dim, 1)
    k: cute.Tensor  # (tile_n, dim, stages)
    v: cute.Tensor  # (tile_n, dim_v, stages)
    out: cute.Tensor  # (tile_m, dim_v, 1)


class Walk(NamedTuple):
    """What a thread needs at every KV block."""

    mma: cute.TiledMma
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
