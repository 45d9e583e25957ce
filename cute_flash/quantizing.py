"""The operator `quantize`: elements and scales of a block at a time, by a kernel (arch/quantize.py)."""

from __future__ import annotations

import torch

from . import contents, launch, ops, scale_factors
from .arch.precision import QUANTIZATIONS
from .arch.problem import Sizes
from .arch.quantize import ATOM_ROWS, QuantizeProblem
from .dispatch import beside, emulation, place_of

DTYPES = (torch.float16, torch.bfloat16)


def serves(x: torch.Tensor, format: str, block: int | None) -> bool:
    """Whether a kernel brings a checked x to a format: where scales are those of blocks that a CTA holds."""
    form = QUANTIZATIONS[format]
    blocks = block is not None or form.group is not None
    here = x.is_cuda or (x.device.type == "cpu" and emulation() is not None)
    return here and x.dtype in DTYPES and x.shape[3] <= 256 and form.element.bits == 8 and blocks


def quantize(
    x: torch.Tensor, signs: torch.Tensor | None, format: str, block: int | None, axis: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, scale) as `Quantized` has them. signs: float32 (head_dim,), of a rotation."""
    return torch.ops.cute_flash.quantize.default(x, signs, format, block or ATOM_ROWS, axis)


def _new(x: torch.Tensor, format: str, block: int, axis: str) -> tuple[torch.Tensor, torch.Tensor]:
    form, (batch, seqlen, heads, head_dim) = QUANTIZATIONS[format], x.shape
    if form.group is None:
        shape: tuple[int, ...] = (batch, heads, -(-seqlen // block))
    elif axis == "head_dim":
        shape = (batch, heads, *scale_factors.shape_of(seqlen, head_dim // form.group))
    else:
        shape = (batch, heads, *scale_factors.shape_of(head_dim, -(-seqlen // form.group)))
    data, scale = (getattr(torch, found.name) for found in (form.element, form.scale))
    return x.new_empty(x.shape, dtype=data), x.new_empty(shape, dtype=scale)


def _quantize(x, signs, format, block, axis):
    data, scale = _new(x, format, block, axis)
    batch, seqlen, heads, head_dim = x.shape
    dtype = str(x.dtype).removeprefix("torch.")
    problem = QuantizeProblem(dtype, head_dim, format, block, signs is not None, axis)
    place = place_of(x.device)
    values = {
        "x": contents.as_kernels_read(x),
        "signs": signs,
        "data": data.view(torch.int64),
        "scale": scale if scale.dtype is torch.float32 else scale.view(torch.uint8),
    }
    steps = beside(problem, place.device, Sizes(batch, heads, heads, seqlen, 0))
    launch.run(launch.bind(steps, place, values), values)
    return data, scale


_SCHEMA = "quantize(Tensor x, Tensor? signs, str format, int block, str axis) -> (Tensor data, Tensor scale)"
ops.register("quantize", _SCHEMA, _quantize, lambda x, signs, *options: _new(x, *options))
