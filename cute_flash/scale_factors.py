"""The order in which tensor cores of compute capability 10 take scales of a byte: "F8_128x4".

A scale belongs to one row and one group of numbers along it. 128 rows times 4 groups lie in 512 bytes, row r
of them at 16 (r % 32) + 4 (r // 32), its four groups next to each other; such atoms lie one after another
along the groups, then along the rows (cuDNN's F8_128x4; PTX ISA, "Scale factor layout" of tcgen05.mma).
"""

from __future__ import annotations

import torch

ROWS, GROUPS = 128, 4  # of an atom
LANES = 32  # of tensor memory that an atom's 16-byte pieces go to


def shape_of(rows: int, groups: int) -> tuple[int, ...]:
    """(row atoms, group atoms, 32, 4, 4): what scales (rows, groups) are brought to."""
    return -(-rows // ROWS), -(-groups // GROUPS), LANES, ROWS // LANES, GROUPS


def to_atoms(scales: torch.Tensor) -> torch.Tensor:
    """(..., rows, groups) bytes -> (..., *shape_of(rows, groups)), contiguous; 0 where there is no scale."""
    rows, groups = scales.shape[-2:]
    padded = torch.nn.functional.pad(scales, (0, -groups % GROUPS, 0, -rows % ROWS))
    parts = padded.unflatten(-1, (-1, GROUPS)).unflatten(-3, (-1, ROWS // LANES, LANES))
    return parts.movedim((-2, -3), (-4, -3)).contiguous()


def from_atoms(atoms: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `to_atoms`."""
    parts = atoms.movedim((-4, -3), (-2, -3))
    return parts.flatten(-2, -1).flatten(-4, -2)[..., :rows, :groups]
