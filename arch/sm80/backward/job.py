"""What one CTA of the main kernel works on, and what a thread of it needs at every query tile."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from ...backward import BackwardOperands
from ...common.blocks import Range
from ...common.dropout import Dropout
from ...common.rules import Rules
from ...common.sequence import Sequence
from ...problem import Problem
from ..mma import Pieces
from .grid import Grid, HeldPieces


class KeyBlock(NamedTuple):
    """Keys first_key and on of one sequence, as one query head sees them.

    member: which of the query heads that share them.
    """

    call: BackwardOperands
    sequence: Sequence
    head: Int32
    kv_head: Int32
    member: Int32
    first_key: Int32
    thread: Int32


class Tiles(NamedTuple):
    """Shared memory. dK and dV take the places of K and V in the end."""

    k: cute.Tensor  # (tile_n, dim, 1)
    v: cute.Tensor  # (tile_n, dim_v, 1)
    q: cute.Tensor  # (tile_m, dim, stages)
    grad_out: cute.Tensor  # (tile_m, dim_v, stages)
    p: cute.Tensor  # (tile_m, tile_n, 1)
    ds: cute.Tensor  # (tile_m, tile_n, 1)
    lse: cute.Tensor  # (tile_m, stages) fp32
    delta: cute.Tensor  # (tile_m, stages) fp32


class QueryStream(NamedTuple):
    """The query tiles to visit, and the tiles that they are copied to."""

    block: KeyBlock
    tiles: Tiles
    visits: Range


class ProductOperands(NamedTuple):
    """The tiles as operands of the five products."""

    q: Pieces  # S = Q K^T
    k: Pieces
    grad_out: Pieces  # dP = dO V^T
    v: Pieces
    p_transposed: Pieces  # dV += P^T dO
    grad_out_as_b: Pieces
    ds: Pieces  # dQ = dS K
    k_as_b: Pieces
    ds_transposed: Pieces  # dK += dS^T Q
    q_as_b: Pieces

    def at(self, zero: Int32, q_bytes: Int32, out_bytes: Int32) -> ProductOperands:
        """Those of one visit. zero: see `hidden_zero`. q_bytes, out_bytes: before its tiles of Q and dO."""
        here = ProductOperands(*(pieces.at(zero) for pieces in self))
        return here._replace(
            q=here.q.shifted(q_bytes),
            q_as_b=here.q_as_b.shifted(q_bytes),
            grad_out=here.grad_out.shifted(out_bytes),
            grad_out_as_b=here.grad_out_as_b.shifted(out_bytes),
        )


class Walk(NamedTuple):
    """What a thread needs at every query tile."""

    problem: Problem
    mma: cute.TiledMma
    block: KeyBlock
    tiles: Tiles
    stream: QueryStream
    rules: Rules
    dropout: Dropout | None
    grid_s: Grid
    grid_k: Grid
    grid_v: Grid
    grid_q: Grid
    operands: ProductOperands
    scale_log2: Float32
    acc_k: cute.Tensor
    acc_v: cute.Tensor
    held_k: HeldPieces | None
    held_v: HeldPieces | None
