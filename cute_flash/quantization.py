"""`quantize`: q, k or v in 8 or 4 bits, with the scales that their numbers share.

    x (batch, seqlen, heads, head_dim) -> turned by positions, rotated -> largest magnitude of each group
        -> scale -> elements

Everything is computed in float32, and a scale from the largest magnitude alone:

    e4m3, e5m2   scale = largest / 448 (57344), float32; element = x * (448 / largest), rounded
    mxfp8        scale = the least power of two that is largest / 448 or more, so that nothing saturates
    nvfp4        scale = largest / 6 / tensor_scale, rounded to e4m3; tensor_scale = a head's / (448 * 6)

Rounding is to nearest, ties to even. A largest magnitude below 2**-100 counts as that. A NaN stays one, or
becomes 6 in nvfp4, which has none, and has no part in scales; an infinity makes its group NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import quantizing, rotary, scale_factors
from .arch.precision import QUANTIZATION_BLOCKS, QUANTIZATIONS, Quantization
from .request import needs_gradient
from .rotation import Rotation

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
AXES = ("head_dim", "seqlen")
LEAST = 2.0**-100  # what the largest magnitude of a group counts as, at least: its inverse is finite
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between 0, 0.5, 1, 1.5, 2, 3, 4 and 6


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in few bits; `print` tells what it is.

    data: (batch, seqlen, heads, head_dim) of float8_e4m3fn or float8_e5m2; of nvfp4 float4_e2m1fn_x2, of
        which a byte holds two neighbours: (batch, seqlen, heads, head_dim / 2).
    scale: what an element is multiplied by. e4m3, e5m2: float32 (batch, heads_kv), or with a block
        (batch, heads, blocks). mxfp8 (float8_e8m0fnu) and nvfp4 (float8_e4m3fn): in the order that tensor
        cores take (scale_factors.py), (batch, heads, row atoms, group atoms, 32, 4, 4), rows being those of
        `seqlen` and groups along `head_dim`, or the other way round with axis "seqlen".
    tensor_scale: of nvfp4, what its scales are multiplied by, float32 (batch, heads_kv); else None.
    block: rows that share a scale, None where all of a head do, or groups along `axis`.
    rotation: what x was rotated by, None: as it was.
    """

    format: str
    data: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    block: int | None
    axis: str
    rotation: Rotation | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, seqlen, heads, head_dim), also where a byte holds two numbers."""
        *rows, columns = self.data.shape
        return (*rows, columns * 8 // QUANTIZATIONS[self.format].element.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return sum(x.nbytes for x in (self.data, self.scale, self.tensor_scale) if x is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32, *, rotated: bool = False) -> torch.Tensor:
        """The numbers that are stored, (batch, seqlen, heads, head_dim); rotated: as products see them."""
        elements = _elements(self.data)
        grouping = self._grouping()
        tiles = grouping.tiles(elements) * grouping.spread(self._scales(grouping))
        y = grouping.whole(tiles, self.shape)
        return (y if self.rotation is None or rotated else self.rotation.undo(y)).to(dtype)

    def _grouping(self) -> _Grouping:
        form, sharing = QUANTIZATIONS[self.format], self.scale.shape[1]
        return _Grouping.of(form, self.block, self.axis, self.shape, sharing)

    def _scales(self, grouping: _Grouping) -> torch.Tensor:
        """(batch, groups of heads, of rows, of columns) float32."""
        if QUANTIZATIONS[self.format].group is None:
            return self.scale[..., None] if self.block else self.scale[..., None, None]
        _, seqlen, _, head_dim = self.shape
        counts = -(-seqlen // grouping.rows), head_dim // grouping.columns
        counts = counts if self.axis == "head_dim" else counts[::-1]
        found = scale_factors.from_atoms(self.scale.view(torch.uint8), *counts)
        found = (found if self.axis == "head_dim" else found.mT).contiguous()
        found = found.view(self.scale.dtype).float()
        if self.tensor_scale is None:
            return found
        sharing = found.shape[1] // self.tensor_scale.shape[1]
        return found * self.tensor_scale.repeat_interleave(sharing, 1)[..., None, None]

    def __str__(self) -> str:
        form, (_, _, _, head_dim) = QUANTIZATIONS[self.format], self.shape
        shared = f"{form.group} along {self.axis}" if form.group else f"{self.block or 'all'} rows of a head"
        words = [
            f"{self.format} {self.shape}",
            f"a {form.scale.name} scale for {shared}, {tuple(self.scale.shape)}",
            f"{8 * self.nbytes / (self.data.numel() * 8 // form.element.bits):.3g} bits per number",
        ]
        if self.tensor_scale is not None:
            words.insert(2, f"relative to a float32 one for a head, {tuple(self.tensor_scale.shape)}")
        if self.rotation is not None:
            seed, width = self.rotation.seed, self.rotation.width
            part = f"{width} of {head_dim} at a time" if width != head_dim else f"of {width}"
            words.append(f"rotated by signs of seed {seed} and the Walsh–Hadamard transform {part}")
        return "; ".join(words)


def quantize(
    x: torch.Tensor,
    format: str = "e4m3",
    *,
    block: int | None = None,
    axis: str = "head_dim",
    heads_kv: int | None = None,
    hadamard: bool = True,
    seed: int = 0,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = True,
    seqlen_offsets: int | torch.Tensor = 0,
) -> Quantized:
    """Bring q, k or v to a format of few bits.

    16-bit numbers of up to 256 columns by a kernel, to the bits of torch, which does the rest, CPU tensors
    where no device is emulated among it. The kernel reads and writes numbers once; where scales depend on all
    of a head, in nvfp4, and in e4m3 and e5m2 without a block, a kernel before reads them another time.

    x: (batch, seqlen, heads, head_dim), float16, bfloat16 or float32; head_dim a multiple of 8.
    format: "e4m3" or "e5m2", FP8 with scales in float32; "mxfp8", e4m3 with a power of two for 32 numbers;
        "nvfp4", e2m1 with an e4m3 scale for 16 numbers: for q and k only.
    block: of e4m3 and e5m2: so many rows of a head share a scale, 64 or 128; None: all of them.
    axis: of mxfp8 and nvfp4: along which numbers share a scale, the axis that the product sums over:
        "head_dim" for q and k, "seqlen" for v.
    heads_kv: without a block, and for nvfp4's tensor_scale: so many scales per sequence, neighbouring heads
        sharing one, as all query heads of a KV head do; None: one for each head.
    hadamard: rotate by random signs and the Walsh–Hadamard transform first. q and k of equal head_dim and
        `seed` are rotated alike, so that q·k stays what it was. v is not summed over head_dim: False.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2), of x's dtype: rotary embedding of the first
        rotary_dim numbers of each row, a multiple of 16, before everything else, and not rounded in between.
        `dequantize` does not undo it.
    rotary_interleaved: neighbours are a pair, not numbers of the first and the second half (GPT-NeoX).
    seqlen_offsets: the position of each sequence's first row, an int or int32 (batch,).

    Raises TypeError, ValueError and NotImplementedError with the argument, what was given and what is
    allowed.
    """
    form = _check(x, format, block, axis)
    heads_kv = _check_heads(heads_kv, x.shape[2], form, block)
    rotation = check_rotation(x.shape[3], hadamard, seed)
    turning = rotary.check(x, rotary_cos, rotary_sin, rotary_interleaved, seqlen_offsets)
    if quantizing.serves(x):
        signs = None if rotation is None else rotation.signs(x.device)
        scaling = quantizing.Scaling(format, block, axis, heads_kv)
        found = quantizing.quantize(x.detach(), signs, turning, scaling)
        return Quantized(format, *found, block, axis, rotation)
    return _in_torch(turning.apply(x.detach().float()), form, (block, axis, heads_kv), rotation)


def _in_torch(
    y: torch.Tensor, form: Quantization, shared: tuple[int | None, str, int], rotation: Rotation | None
) -> Quantized:
    """`quantize` of float32, whose block, axis and heads_kv are `shared`. What kernels are held to."""
    block, axis, heads_kv = shared
    y = y if rotation is None else rotation.apply(y)
    grouping = _Grouping.of(form, block, axis, y.shape, heads_kv if block is None else y.shape[2])
    tiles, tensor_scale = grouping.tiles(y), None
    if form.name == "nvfp4":
        by_head = _Grouping(heads_kv, y.shape[1], y.shape[3])
        tensor_scale = by_head.largest(y).flatten(1).clamp(min=LEAST)
        tensor_scale /= torch.full_like(tensor_scale, 448.0 * form.largest)
    scale, inverse = _scales(form, grouping.largest(y), tensor_scale)
    data = _round(form, grouping.whole(tiles * grouping.spread(inverse), y.shape))
    scale = _laid_out(form, scale, block, axis)
    return Quantized(form.name, data, scale, tensor_scale, block, axis, rotation)


class _Grouping(NamedTuple):
    """Which numbers of (batch, seqlen, heads, head_dim) share a scale.

    heads: so many groups of neighbouring heads. rows, columns: of a group; the last one's rows may be fewer.
    """

    heads: int
    rows: int
    columns: int

    @classmethod
    def of(cls, form: Quantization, block: int | None, axis: str, shape: tuple, sharing: int) -> _Grouping:
        """sharing: the groups of heads that have scales of their own, where blocks of rows share one."""
        _, seqlen, heads, head_dim = shape
        if form.group is None:
            return cls(sharing, block or seqlen, head_dim)
        return cls(heads, 1, form.group) if axis == "head_dim" else cls(heads, form.group, 1)

    def tiles(self, y: torch.Tensor) -> torch.Tensor:
        """(batch, groups of heads, heads, groups of rows, rows, groups of columns, columns); 0 beyond."""
        y = torch.nn.functional.pad(y.transpose(1, 2), (0, 0, 0, -y.shape[1] % self.rows))
        y = y.unflatten(3, (-1, self.columns)).unflatten(2, (-1, self.rows))
        return y.unflatten(1, (self.heads, -1))

    def whole(self, tiles: torch.Tensor, shape: tuple) -> torch.Tensor:
        """The inverse of `tiles`, contiguous."""
        y = tiles.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return y[:, :, : shape[1]].transpose(1, 2).contiguous()

    def largest(self, y: torch.Tensor) -> torch.Tensor:
        """Magnitude: (batch, groups of heads, of rows, of columns)."""
        return self.tiles(y.abs().nan_to_num(0.0, torch.inf)).amax((2, 4, 6))

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What `largest` is shaped as, beside `tiles`."""
        return scale[:, :, None, :, None, :, None]


def _scales(
    form: Quantization, largest: torch.Tensor, tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, in its format; what numbers are multiplied by, float32), both shaped as `largest`."""
    # Tensors, for torch divides numbers by tensors, and on GPUs tensors by numbers, with two roundings.
    limit = torch.full_like(largest, form.largest)
    if tensor_scale is not None:
        whole = tensor_scale.repeat_interleave(largest.shape[1] // tensor_scale.shape[1], 1)[..., None, None]
        scale = (largest / limit / whole).clamp(max=448.0).to(torch.float8_e4m3fn)
        factor = scale.float() * whole
        return scale, torch.where(factor > 0, factor.reciprocal(), 0.0)
    largest = largest.clamp(min=LEAST)
    if form.group is None:
        return largest / limit, limit / largest
    # float32's own exponent, one higher where it has a fraction, is ue8m0's; 254 - it is the inverse's.
    exponent = (largest / limit).view(torch.int32) + 0x7FFFFF >> 23
    inverse = (254 - exponent << 23).view(torch.float32)
    return exponent.to(torch.uint8).view(torch.float8_e8m0fnu), inverse


def _laid_out(form: Quantization, scale: torch.Tensor, block: int | None, axis: str) -> torch.Tensor:
    """Scales (batch, groups of heads, of rows, of columns) as `Quantized.scale` has them."""
    if form.group is None:
        return scale.flatten(2) if block else scale.flatten(1)
    by_row = scale.view(torch.uint8)
    return scale_factors.to_atoms(by_row if axis == "head_dim" else by_row.mT).view(scale.dtype)


def _round(form: Quantization, y: torch.Tensor) -> torch.Tensor:
    """Elements, of float32 numbers divided by their scales."""
    if form.element.bits == 8:
        return y.clamp(-form.largest, form.largest).to(getattr(torch, form.element.name))
    size = y.abs()
    # A tie goes to the even pattern: upwards where the lower one is odd.
    codes = sum((size >= tie if i % 2 else size > tie).to(torch.uint8) for i, tie in enumerate(E2M1_TIES))
    codes |= y.signbit().to(torch.uint8) << 3
    codes.masked_fill_(y.isnan(), 7)  # as PTX's conversion has it
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).view(torch.float4_e2m1fn_x2)


def _elements(data: torch.Tensor) -> torch.Tensor:
    """float32 numbers of stored elements."""
    if data.dtype is not torch.float4_e2m1fn_x2:
        return data.float()
    codes = data.view(torch.uint8)
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=data.device)
    values = torch.cat([magnitudes, -magnitudes])
    return values[codes.int()]


def _check(x: Any, format: str, block: int | None, axis: str) -> Quantization:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {type(x).__name__}; allowed: torch.Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if x.ndim != 4 or not x.numel():
        allowed = "(batch, seqlen, heads, head_dim), none of them 0"
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: {allowed}")
    if needs_gradient(x):
        raise NotImplementedError("x requires a gradient, and rounding has none; allowed: x.detach()")
    if format not in QUANTIZATIONS:
        raise ValueError(f"format is {format!r}; allowed: {', '.join(QUANTIZATIONS)}")
    form, head_dim = QUANTIZATIONS[format], x.shape[3]
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(AXES)}")
    step = form.group if form.group and axis == "head_dim" else 8
    if head_dim % step:
        raise ValueError(f"x has head_dim {head_dim}; allowed for {format}: multiples of {step}")
    if form.group is None and block not in (None, *QUANTIZATION_BLOCKS):
        allowed = ", ".join(map(str, QUANTIZATION_BLOCKS))
        raise ValueError(f"block is {block!r}; allowed: None, {allowed} rows that share a scale")
    if form.group is not None and block is not None:
        raise ValueError(f"block is {block!r}; allowed for {format}: None, {form.group} numbers have a scale")
    if axis == "seqlen" and form.group is None:
        raise ValueError(f"axis is 'seqlen'; allowed for {format}: 'head_dim', scales are of whole rows")
    if axis == "seqlen" and form.element.bits < 8:
        raise NotImplementedError(f"axis is 'seqlen'; allowed for {format}: 'head_dim', it is for q and k")
    return form


def _check_heads(heads_kv: int | None, heads: int, form: Quantization, block: int | None) -> int:
    """How many scales a sequence has, where all rows of a head share one."""
    if heads_kv is None:
        return heads
    if block is not None or form.name == "mxfp8":
        shared = f"{block} rows" if block is not None else f"{form.group} numbers"
        raise ValueError(f"heads_kv is {heads_kv!r}; allowed: None, for {shared} of one head share a scale")
    if type(heads_kv) is not int or heads_kv < 1 or heads % heads_kv:
        raise ValueError(f"heads_kv is {heads_kv!r}; allowed: None, or a divisor of x's {heads} heads")
    return heads_kv


def check_rotation(head_dim: int, hadamard: bool, seed: int) -> Rotation | None:
    if type(hadamard) is not bool:
        raise TypeError(f"hadamard is {hadamard!r}; allowed: True, False")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; allowed: an integer from 0 to 2**63 - 1")
    return Rotation(head_dim, seed) if hadamard else None
