"""Where the FP8 gradients' tiles lie: those for 16 bits, and copies by columns."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32

from ...common.memory import SmemAllocator, allocate
from ...common.operand import Operand
from ...problem import Problem
from ..backward.config import ROWS
from ..backward.job import GradientOperands, Tiles
from .config import Config


def operands_of(problem: Problem, config: Config) -> GradientOperands:
    """The operands of a problem; dK and dV, which leave as sums, are none."""
    ragged_q, ragged_k = problem.varlen or problem.seqused_q, problem.varlen or problem.seqused_k

    def operand(rows: int, columns: int, count: int, ragged: bool = False) -> Operand:
        return Operand.of(problem.precision, rows, columns, count, ragged)

    columns, columns_v, tile_m = config.columns, config.columns_v, config.tile_m
    return GradientOperands(
        q=operand(tile_m, columns, config.q_stages, ragged_q),
        k=operand(config.keys, columns, config.warpgroups, ragged_k),
        v=operand(config.keys, columns_v, config.warpgroups, ragged_k),
        grad_out=operand(tile_m, columns_v, config.grad_out_stages, ragged_q),
        grad_k=None,
        grad_v=None,
        q_columns=operand(columns, tile_m, config.q_stages),
        k_columns=operand(columns, config.cta_keys, 1),
        grad_out_columns=operand(columns_v, tile_m, config.grad_out_stages),
    )


def ds_operand(config: Config) -> Operand:
    """dS: (rows, keys of all warpgroups)."""
    return Operand.of(config.ds_precision, config.tile_m, config.cta_keys, config.ds_stages, False)


def tiles_of(smem: SmemAllocator, config: Config, operands: GradientOperands) -> Tiles:
    """Places for all of it. ds is not transposed."""

    def numbers(*shape: int) -> cute.Tensor:
        return smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=128)

    moved = {name: allocate(smem, x) for name, x in operands._asdict().items() if x is not None}
    return Tiles(
        moved=GradientOperands(**{name: moved.get(name) for name in GradientOperands._fields}),
        p=None,
        ds=allocate(smem, ds_operand(config)),
        peer_ds=None,
        grad_q=numbers(ROWS * config.handed_columns, config.warpgroups),
        lse=numbers(config.tile_m, config.q_stages),
        delta=numbers(config.tile_m, config.grad_out_stages),
    )
