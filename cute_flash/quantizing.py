"""The operator `quantize`: elements and scales of a block at a time, by a kernel (arch/quantize.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from . import contents, launch, ops, scale_factors
from .arch.precision import QUANTIZATIONS
from .arch.problem import Sizes
from .arch.quantize import ATOM_ROWS, QuantizeProblem
from .dispatch import beside, emulation, place_of
from .rotary import Rotary

DTYPES = (torch.float16, torch.bfloat16)


class Scaling(NamedTuple):
    """Which numbers share scales, as `cute_flash.quantize` has it. heads_kv: scales of a sequence's heads."""

    format: str
    block: int | None
    axis: str
    heads_kv: int

    @property
    def by_head(self) -> bool:
        """Whether scales depend on all of a head."""
        return self.block is None if QUANTIZATIONS[self.format].group is None else self.format == "nvfp4"


def serves(x: torch.Tensor) -> bool:
    """Whether a kernel brings a checked x to a format."""
    here = x.is_cuda or (x.device.type == "cpu" and emulation() is not None)
    return here and x.dtype in DTYPES and x.shape[3] <= 256


def quantize(
    x: torch.Tensor, signs: torch.Tensor | None, rotary: Rotary, scaling: Scaling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(data, scale, tensor_scale) as `Quantized` has them. signs: float32 (head_dim,), of a rotation."""
    data, scale, tensor_scale = torch.ops.cute_flash.quantize.default(x, signs, *rotary, *scaling)
    return data, scale, tensor_scale if scaling.format == "nvfp4" else None


def _new(x: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An operator has a tensor for every result."""
    form, (batch, seqlen, heads, head_dim) = QUANTIZATIONS[scaling.format], x.shape
    by_head = (batch, scaling.heads_kv)
    if form.group is None:
        shape = (batch, heads, -(-seqlen // scaling.block)) if scaling.block else by_head
    elif scaling.axis == "head_dim":
        shape = (batch, heads, *scale_factors.shape_of(seqlen, head_dim // form.group))
    else:
        shape = (batch, heads, *scale_factors.shape_of(head_dim, -(-seqlen // form.group)))
    data, scale = (getattr(torch, found.name) for found in (form.element, form.scale))
    return (
        x.new_empty((*x.shape[:3], head_dim * form.element.bits // 8), dtype=torch.uint8).view(data),
        x.new_empty(shape, dtype=scale),
        x.new_empty(by_head if form.name == "nvfp4" else 0, dtype=torch.float32),
    )


def _quantize(x, signs, *options):
    rotary, scaling = _split(options)
    found, place, form = _new(x, scaling), place_of(x.device), QUANTIZATIONS[scaling.format]
    data, scale, tensor_scale = found
    values = {
        "x": contents.as_kernels_read(x),
        "signs": signs,
        "data": data.view(torch.uint8).view(torch.int64 if form.element.bits == 8 else torch.int32),
        "scale": scale if scale.dtype is torch.float32 else scale.view(torch.uint8),
        "tensor_scale": tensor_scale,
        "seqlen_offsets": rotary.offsets,
    }
    if rotary.cos is not None:
        values["rotary_cos"], values["rotary_sin"] = map(contents.as_kernels_read, (rotary.cos, rotary.sin))
    batch, seqlen, heads, _ = x.shape
    passes = [_problem(x, signs is not None, rotary, scaling)]
    if scaling.by_head:
        values["peaks"] = x.new_zeros((batch, scaling.heads_kv), dtype=torch.int32)
        passes.insert(0, replace(passes[0], form="e4m3", peaks="found"))
    for problem in passes:
        steps = beside(problem, place.device, Sizes(batch, heads, heads, seqlen, 0))
        launch.run(launch.bind(steps, place, values), values)
    return found


def _problem(x: torch.Tensor, rotated: bool, rotary: Rotary, scaling: Scaling) -> QuantizeProblem:
    """What is compiled, of a pass that writes elements."""
    return QuantizeProblem(
        dtype=str(x.dtype).removeprefix("torch."),
        head_dim=int(x.shape[3]),
        form=scaling.format,
        block=scaling.block or ATOM_ROWS,
        rotated=rotated,
        axis=scaling.axis,
        peaks="given" if scaling.by_head else None,
        rotary_dim=rotary.dim,
        interleaved=rotary.cos is not None and rotary.interleaved,
        offsets=rotary.offsets is not None,
    )


def _split(options: tuple) -> tuple[Rotary, Scaling]:
    """What the operator's arguments behind x and signs are."""
    behind = len(Rotary._fields)
    return Rotary(*options[:behind]), Scaling(*options[behind:])


_SCHEMA = (
    "quantize(Tensor x, Tensor? signs, Tensor? cos, Tensor? sin, Tensor? offsets, bool interleaved, "
    "str format, int? block, str axis, int heads_kv) -> (Tensor data, Tensor scale, Tensor tensor_scale)"
)
ops.register("quantize", _SCHEMA, _quantize, lambda x, signs, *options: _new(x, _split(options)[1]))
