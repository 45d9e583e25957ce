"""Rotary embedding of every row of a tensor, in float32: an option of `quantize`, checked, and by torch.

Row i of a sequence stands at position `offset` + i, and pairs of its numbers are turned by that position's
angles (Su et al. 2021): q and k attend to each other by the distance between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import contents, request, scalars
from .kv_cache import ROTARY_STEP


class Rotary(NamedTuple):
    """cos, sin: (positions, rotary_dim / 2), None: no rotation. offsets: int32 (batch,), None: all 0.

    interleaved: neighbours are a pair, not numbers of the first and the second half (GPT-NeoX).
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    interleaved: bool = False

    @property
    def dim(self) -> int:
        """How many numbers of a row are turned; 0: none."""
        return 0 if self.cos is None else 2 * self.cos.shape[1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, seqlen, heads, head_dim), float32, turned."""
        if self.cos is None:
            return x
        rows = torch.arange(x.shape[1], device=x.device)
        positions = rows[None] if self.offsets is None else self.offsets[:, None] + rows
        cos, sin = (table[positions, None].float() for table in (self.cos, self.sin))
        part, rest = x.split([self.dim, x.shape[3] - self.dim], -1)
        a, b = part.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else part.chunk(2, -1)
        turned = a * cos - b * sin, a * sin + b * cos
        part = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat([part, rest], -1)


def check(x: torch.Tensor, cos: Any, sin: Any, interleaved: Any, offsets: Any) -> Rotary:
    """What `quantize` is given, as a Rotary; a position that all sequences have is where its tables begin."""
    if type(interleaved) is not bool:
        raise TypeError(f"rotary_interleaved is {interleaved!r}; allowed: True, False")
    if (cos is None) != (sin is None):
        given, other = ("rotary_cos", "rotary_sin") if sin is None else ("rotary_sin", "rotary_cos")
        raise ValueError(f"{given} is given without {other}; allowed: both, or neither")
    if cos is None:
        if not scalars.is_integer(offsets) or offsets != 0:
            raise ValueError("seqlen_offsets is given without rotary_cos and rotary_sin; allowed: with them")
        return Rotary()
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_table(name, table, x)
    if cos.shape != sin.shape:
        raise ValueError(
            f"rotary_sin has shape {tuple(sin.shape)}, rotary_cos has {tuple(cos.shape)}: they must be equal"
        )
    cos, sin = cos.detach(), sin.detach()
    if not scalars.is_integer(offsets):
        _check_offsets(offsets, x, cos.shape[0])
        return Rotary(cos, sin, offsets, interleaved)
    seqlen, rows, first = x.shape[1], cos.shape[0], scalars.integer(offsets)
    if not 0 <= first <= rows - seqlen:
        raise ValueError(
            f"seqlen_offsets is {first}, and x has {seqlen} rows; allowed: positions 0 to {rows - 1}, the "
            "rows of rotary_cos"
        )
    return Rotary(*(table[first : first + seqlen] for table in (cos, sin)), None, interleaved)


def _check_table(name: str, table: Any, x: torch.Tensor) -> None:
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"{name} is {type(table).__name__}; allowed: torch.Tensor")
    if table.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {table.dtype}, x has {x.dtype}: they must be equal")
    if table.device != x.device:
        raise ValueError(f"{name} is on {table.device}, x is on {x.device}: they must be on one device")
    if table.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(table.shape)}; allowed: (positions, rotary_dim / 2)")
    dim, head_dim = 2 * table.shape[1], x.shape[3]
    if dim % ROTARY_STEP or not 0 < dim <= head_dim:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}, rotary_dim {dim}; allowed: multiples of {ROTARY_STEP} "
            f"up to head_dim {head_dim}"
        )


def _check_offsets(offsets: Any, x: torch.Tensor, rows: int) -> None:
    """Numbers of a tensor on a GPU are looked at with CUTE_FLASH_CHECK=1 alone."""
    batch, seqlen = x.shape[:2]
    if not isinstance(offsets, torch.Tensor):
        raise TypeError(f"seqlen_offsets is {type(offsets).__name__}; allowed: an int, or torch.Tensor")
    request.check_tensor("seqlen_offsets", offsets, x, (torch.int32,), 1)
    if offsets.shape[0] != batch:
        raise ValueError(
            f"seqlen_offsets has {offsets.shape[0]} numbers; allowed: {batch}, one for each sequence"
        )
    if not contents.can_be_read(x.device):
        return
    for i, first in enumerate(offsets.tolist()):
        if not 0 <= first <= rows - seqlen:
            raise ValueError(
                f"seqlen_offsets[{i}] is {first}, and x has {seqlen} rows; allowed: positions 0 to "
                f"{rows - 1}, the rows of rotary_cos"
            )
