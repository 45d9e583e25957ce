"""A tile of gradients: what our main kernel is launched with, and what FlashAttention-2's tiles ask for.

A tile is tile_m rows of Q and dO against tile_n keys: five products, one exponential per score, and dQ added
to global memory. What it asks of shared memory follows from how warps share the products out: each warp reads
its rows of A and its columns of B. FlashAttention-2's own numbers: flash_bwd_launch_template.h, for an A100
(Dao-AILab/flash-attention, csrc/flash_attn/src).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from cute_flash.arch.backward import BackwardOperands, scratch_columns, scratch_rows
from cute_flash.arch.quantized_backward import QuantizedBackwardOperands
from cute_flash.arch.transposed import COPIED, ColumnsBackwardOperands, ColumnsBackwardProblem
from cute_flash.dispatch import Answer

WORK = 128 * 128  # scores; what kernels with other tiles are compared by


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, and rows × columns of warps on S and dP, on dK and dV, and on dQ."""

    tile_m: int
    tile_n: int
    grid_s: tuple[int, int]
    grid_k: tuple[int, int]
    grid_v: tuple[int, int]
    grid_q: tuple[int, int]
    v_in_registers: bool = False
    k_in_registers: bool = False

    def flops(self, dims: tuple[int, int]) -> int:
        """Of the five products, of which three have head_dim and two head_dim_v."""
        return 2 * self.tile_m * self.tile_n * (3 * dims[0] + 2 * dims[1])

    def shared(self, dims: tuple[int, int]) -> float:
        """Bytes through the data path that shared memory has, without bank conflicts.

        Q and dO copied in; A and B of each product; P and dS written. LSE and D pass it 128 bytes at a time,
        wherever a warp of 8 rows an instruction has them from.
        """
        m, n, (d, d_v) = self.tile_m, self.tile_n, dims
        read = _read(m, n, d, self.grid_s, not self.k_in_registers)
        read += _read(m, n, d_v, self.grid_s, not self.v_in_registers)
        read += _read(n, d_v, m, self.grid_v) + _read(n, d, m, self.grid_k) + _read(m, d, n, self.grid_q)
        statistics = 2 * self.grid_s[1] * m // 8 * 128
        return 2 * m * (d + d_v) + read + 2 * 2 * m * n + statistics

    def reduced(self, dims: tuple[int, int]) -> int:
        """Bytes of dQ that are added to global memory."""
        return 4 * self.tile_m * dims[0]


def _read(rows: int, columns: int, k: int, warps: tuple[int, int], b_too: bool = True) -> int:
    """Bytes of 16-bit operands that warps read for a product (rows, columns) over k."""
    return 2 * k * (rows * warps[1] + b_too * columns * warps[0])


FLASH_ATTENTION_2 = {
    32: Tiles(128, 128, (4, 2), (4, 2), (4, 2), (4, 2), v_in_registers=True),
    64: Tiles(128, 128, (4, 2), (4, 2), (4, 2), (4, 2)),
    96: Tiles(64, 128, (2, 4), (4, 2), (4, 2), (4, 2), v_in_registers=True),
    128: Tiles(64, 128, (2, 4), (4, 2), (4, 2), (2, 4)),
    192: Tiles(64, 64, (4, 2), (2, 4), (2, 4), (2, 4)),
    256: Tiles(64, 64, (4, 2), (2, 4), (2, 4), (2, 4)),
}


@dataclass(frozen=True)
class Asked:
    """What a kernel asks of an A100's SM per WORK scores: FLOP, exponentials, bytes through the data path of
    shared memory, bytes added to global memory."""

    flops: float
    mufu: float
    shared: float
    reduced: float

    def beyond(self, other: Asked) -> dict[str, float]:
        """Of what it asks more than the other does, beyond rounding, and how many times as much."""
        names = (field.name for field in fields(self))
        times = {name: getattr(self, name) / getattr(other, name) for name in names}
        return {name: ratio for name, ratio in times.items() if ratio > 1.005}


def flash_attention_2(dims: tuple[int, int]) -> tuple[Tiles, Asked]:
    """FlashAttention-2's tiles for head dims, and what they ask for. It has one head dim, the larger."""
    tiles, both = FLASH_ATTENTION_2[min(d for d in FLASH_ATTENTION_2 if d >= max(dims))], (max(dims),) * 2
    times = WORK / (tiles.tile_m * tiles.tile_n)
    asked = tiles.flops(both), tiles.tile_m * tiles.tile_n, tiles.shared(both), tiles.reduced(both)
    return tiles, Asked(*(times * number for number in asked))


def tiles_of(config: Any, dims: tuple[int, int]) -> Tiles:
    """Those of our main kernel."""
    d, d_v = map(scratch_columns, dims)
    grids = config.grid_s, config.grid_k(d), config.grid_k(d_v), config.grid_q(d)
    return Tiles(config.tile_m, config.tile_n, *grids, config.v_in_registers, config.k_in_registers)


def differences(ours: Tiles, theirs: Tiles) -> str:
    """In words, what of our tiles is not as theirs; "" where all is."""
    found = []
    if (ours.tile_m, ours.tile_n) != (theirs.tile_m, theirs.tile_n):
        found.append(f"tiles of {ours.tile_m} × {ours.tile_n}, not {theirs.tile_m} × {theirs.tile_n}")
    for grid, products in (("grid_s", "S, dP"), ("grid_k", "dK"), ("grid_v", "dV"), ("grid_q", "dQ")):
        mine, other = getattr(ours, grid), getattr(theirs, grid)
        if mine != other:
            found.append(f"{products} by {mine[0]} × {mine[1]} warps, not {other[0]} × {other[1]}")
    if theirs.v_in_registers and not ours.v_in_registers:
        found.append("V read at every tile, not held in registers")
    return "; ".join(found)


def operands(answer: Answer, dims: tuple[int, int], rows: int, keys: int) -> tuple:
    """Of our main kernel, for so many rows and keys, of whole tiles. Random normal."""
    d, d_v = dims
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, d), (keys, d), (keys, d_v), (rows, d_v))
    q, k, v, grad_out = (torch.randn(1, n, 1, dim, generator=generator).bfloat16() for n, dim in shapes)
    scratch = scratch_rows(rows, 1)
    absent = dict.fromkeys(BackwardOperands._fields)
    return BackwardOperands(**absent | {
        "q": q, "k": k, "v": v, "grad_out": grad_out,
        "lse_log2": torch.full((1, scratch), 8.0), "delta": torch.zeros(1, scratch),
        "grad_q_sum": torch.zeros(1, scratch, scratch_columns(d)),
        "grad_k": torch.empty_like(k), "grad_v": torch.empty_like(v),
        "softmax_scale": d**-0.5,
    })  # fmt: skip


def quantized_operands(answer: Answer, dims: tuple[int, int], rows: int, keys: int) -> tuple:
    """The same of our kernel in FP8: scales of 1, sums of all gradients, copies where it takes them."""
    of_16, scratch = operands(answer, dims, rows, keys), scratch_rows(keys, 1)
    bytes_of = {
        name: getattr(of_16, name).to(torch.float8_e4m3fn).view(torch.uint8)
        for name in ("q", "k", "v", "grad_out")
    }
    sums = {
        f"grad_{name}_sum": torch.zeros(1, scratch, scratch_columns(dim))
        for name, dim in zip("kv", dims, strict=True)
    }
    scales = dict.fromkeys(("q_scale", "k_scale"), torch.ones(1, 1))
    given = of_16._asdict() | bytes_of | sums | scales | {"grad_k": None, "grad_v": None}
    made = QuantizedBackwardOperands(**given)
    if not isinstance(answer.problem, ColumnsBackwardProblem):
        return made
    copies = {f"{name}_columns": _by_columns(getattr(made, name)) for name in COPIED}
    return ColumnsBackwardOperands(*made, **copies)


def _by_columns(x: torch.Tensor) -> torch.Tensor:
    """(1, columns of scratch, rows of scratch), in the order of x, which is as good as any here."""
    _, rows, _, dim = x.shape
    found = x.new_zeros(1, scratch_columns(dim), scratch_rows(rows, 1))
    found[0, :dim, :rows] = x[0, :, 0].T
    return found
