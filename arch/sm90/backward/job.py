"""What one CTA of the main kernel works on, and where its tiles lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from ...common.key_block import KeyBlock, Launch
from ...common.memory import SmemAllocator, allocate, in_place
from ...common.operand import Operand
from ...common.sequence import sequence_of
from ...problem import Problem
from ..edge import Edge
from .config import ROWS, Tiling


class Edges(NamedTuple):
    """What warps fill with ordinary stores. peer_ds: between the two CTAs of a pair, or None."""

    grad_q: Edge
    peer_ds: Edge | None = None


class GradientOperands(NamedTuple):
    """What TMA moves, one head's at a time; maps of it; or tiles of it in shared memory.

    k, v: a tile for each warpgroup, or one for all of them. grad_k, grad_v: a tile for each; no maps where
    heads share keys. peer_k: as k, half of the columns of the other CTA of a pair, or None. *_columns: of 8
    bits, as products want them that sum over rows: (columns, rows), or None.
    """

    q: Any
    k: Any
    v: Any
    grad_out: Any
    grad_k: Any
    grad_v: Any
    peer_k: Any = None
    q_columns: Any = None
    k_columns: Any = None
    grad_out_columns: Any = None

    @staticmethod
    def of(problem: Problem, config: Tiling) -> GradientOperands:
        """The operands of a problem. Rows out of use come as zeros: what is there may be no numbers."""
        ragged_q, ragged_k = problem.varlen or problem.seqused_q, problem.varlen or problem.seqused_k

        def operand(rows: int, columns: int, count: int, ragged: bool) -> Operand:
            return Operand.of(problem.precision, rows, columns, count, ragged)

        columns, columns_v, tiles = config.columns, config.columns_v, config.k_tiles
        keys, peer_k = config.cta_keys // tiles, None
        if config.ctas > 1:
            of_peer = operand(keys, columns, tiles, ragged_k).in_parts(columns // config.peer_columns)
            peer_k = of_peer.in_pieces(config.warpgroups)
        return GradientOperands(
            q=operand(config.tile_m, columns, config.q_stages, ragged_q),
            k=operand(keys, columns, tiles, ragged_k).in_pieces(columns // config.part_columns),
            v=operand(keys, columns_v, tiles, ragged_k),
            grad_out=operand(config.tile_m, columns_v, config.grad_out_stages, ragged_q),
            grad_k=operand(config.keys, columns, config.warpgroups, problem.varlen),
            grad_v=operand(config.keys, columns_v, config.warpgroups, problem.varlen),
            peer_k=peer_k,
        )


def key_block(problem: Problem, config: Tiling, launch: Launch, zero: Int32 | int = 0) -> KeyBlock:
    """What this CTA works on. zero: one that is not known to be 0, where all of it is to be found anew."""
    cta = cute.arch.block_idx()[0] + zero
    tile = launch.schedule.tile(cta // config.ctas, config.tile_n, problem.gqa)
    sequence, rank = sequence_of(launch.call, tile.batch), cta % config.ctas
    first_key = tile.first_key + rank * config.cta_keys
    return KeyBlock(
        launch.call, launch.maps, sequence, tile.head, tile.kv_head, tile.member, first_key,
        tile.first_key, rank,
    )  # fmt: skip


class Sums(NamedTuple):
    """A thread's part of dK and dV, in registers."""

    k: cute.Tensor
    v: cute.Tensor


class Tiles(NamedTuple):
    """Shared memory; see `Config.regions`."""

    moved: GradientOperands  # (rows, columns, tiles); dK and dV in the places of K and V
    p: cute.Tensor | None  # as ds, or None where no product takes P from here
    ds: cute.Tensor  # (keys, tile_m, tiles): dS transposed, of keys as in a tile of K
    peer_ds: cute.Tensor | None  # as ds: of the keys of the other CTA of a pair
    grad_q: cute.Tensor  # (numbers, warpgroups) fp32
    lse: cute.Tensor  # (tile_m, stages) fp32
    delta: cute.Tensor  # (tile_m, stages) fp32

    @staticmethod
    def allocate(smem: SmemAllocator, problem: Problem, config: Tiling, operands: GradientOperands) -> Tiles:
        """Places for all of it."""
        k, v, q, grad_out = (allocate(smem, getattr(operands, name)) for name in ("k", "v", "q", "grad_out"))
        grad_k, grad_v = in_place(k, operands.grad_k), in_place(v, operands.grad_v)
        keys, paired = config.cta_keys // config.k_tiles, config.ctas > 1
        p, ds, peer_ds = (
            Operand.of(problem.precision, keys, config.tile_m, config.k_tiles * stages, False)
            for stages in (config.p_stages, config.ds_stages, 1)
        )

        def numbers(*shape: int) -> cute.Tensor:
            return smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=128)

        return Tiles(
            moved=GradientOperands(
                q, k, v, grad_out, grad_k, grad_v, allocate(smem, operands.peer_k) if paired else None
            ),
            p=allocate(smem, p) if config.p_stages else None,
            ds=allocate(smem, ds),
            peer_ds=allocate(smem, peer_ds) if paired else None,
            grad_q=numbers(ROWS * config.handed_columns, config.warpgroups),
            lse=numbers(config.tile_m, config.q_stages),
            delta=numbers(config.tile_m, config.grad_out_stages),
        )
