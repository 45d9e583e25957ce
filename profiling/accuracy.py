"""What formats of few bits cost, from a model of the kernels' arithmetic.

Root mean square errors of attention against float64 on the same 16-bit inputs, for inputs of several kinds.
The arithmetic is that of a FlashAttention kernel, in plain torch: tiles of keys, from the last to the first,
with a running maximum; P lifted by 2**8, which is exact, and rounded to the format of its product; the row
sum is that of the rounded P, so that its rounding does not bias the output; P V of a tile in the tensor
core's accumulator, which float32 registers take over every so many tiles ("two-level accumulation").

On Blackwell P V adds to O in tensor memory, in float32: P is multiplied by its share of the largest of V's
scales so far, whose unit O has; the maximum may lag 2**4 behind, so that O is seldom rescaled, and P is
lifted by 2**4; and the row sum is that of P before it is rounded.

Outliers, and the figures beside ours, are those of FlashAttention-3 (Shah et al. 2024, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import cute_flash
from cute_flash.emulator.base import short_sums

TILE = 128  # keys of a step
LIFT = 8  # P is multiplied by 2**LIFT: at most 256, of e4m3's 448
LAG = 4  # on Blackwell half of it is for maxima that have not been raised
SEQLEN, HEAD_DIM, QUERIES = 2048, 128, 512  # keys and queries that are quantized; queries that are computed
SINK = 14.0  # by how much the sink's scores are above the others'
LENGTHS = (1024, 4096, 16384, 65536)  # of the table of accumulators
FEW = 64  # queries that are computed there


class Scheme(NamedTuple):
    """How attention is computed.

    qk, v: formats of `cute_flash.quantize`, None: 16 bits. P is e4m3 where v is not None. block, hadamard: as
    there; of mxfp8 and nvfp4 block is of v only. accumulator: of tensor cores, as the emulator's
    fp8_accumulator. promoted: tiles after which float32 takes the accumulator over; None: never.
    backwards: the order of tiles. blackwell: as Blackwell's kernel does it. tile: keys of a step.
    """

    qk: str | None = "e4m3"
    v: str | None = "e4m3"
    block: int | None = None
    hadamard: bool = False
    accumulator: str = "float32"
    promoted: int | None = 1
    backwards: bool = True
    blackwell: bool = False
    tile: int = TILE


SCALED = {"blackwell": True, "tile": 96}  # where tensor cores apply scales
SCHEMES = {
    "16 bits": Scheme(None, None),
    "FP8 per head": Scheme(),
    "FP8 block 128": Scheme(block=128),
    "FP8 Hadamard": Scheme(hadamard=True),
    "FP8 block 128, Hadamard": Scheme(block=128, hadamard=True),
    "FP8 block 128, Hadamard, keys forwards": Scheme(block=128, hadamard=True, backwards=False),
    "sm100: FP8 per head": Scheme(blackwell=True),
    "sm100: FP8 block 128": Scheme(block=128, blackwell=True),
    "sm100: FP8 Hadamard": Scheme(hadamard=True, blackwell=True),
    "sm100: FP8 block 128, Hadamard": Scheme(block=128, hadamard=True, blackwell=True),
    "sm100: MXFP8": Scheme("mxfp8", "mxfp8", **SCALED),
    "sm100: MXFP8 Hadamard": Scheme("mxfp8", "mxfp8", hadamard=True, **SCALED),
    "sm100: MXFP8 + FP8, Hadamard": Scheme("mxfp8", hadamard=True, **SCALED),
    "sm100: NVFP4 + FP8": Scheme("nvfp4", **SCALED),
    "sm100: NVFP4 + FP8, Hadamard": Scheme("nvfp4", hadamard=True, **SCALED),
    "sm100: NVFP4 + MXFP8, Hadamard": Scheme("nvfp4", "mxfp8", hadamard=True, **SCALED),
}
ACCUMULATORS = {
    "float32": Scheme(hadamard=True),
    "Hopper, taken over every tile": Scheme(hadamard=True, accumulator="hopper"),
    "Hopper, every 4 tiles": Scheme(hadamard=True, accumulator="hopper", promoted=4),
    "Hopper, never": Scheme(hadamard=True, accumulator="hopper", promoted=None),
}


def normal(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of normal(0, 1)."""
    return tuple(torch.randn(rows, columns, generator=generator) for _ in range(3))


def outliers(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """normal(0, 1) + normal(0, 10²) with probability 0.001."""

    def one() -> torch.Tensor:
        x, more = (torch.randn(rows, columns, generator=generator) for _ in range(2))
        return x + torch.where(torch.rand(rows, columns, generator=generator) < 0.001, 10.0 * more, 0.0)

    return one(), one(), one()


def sink(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """normal(0, 1), but the first key has score SINK with all queries and no value: an attention sink."""
    q, k, v = normal(generator, rows, columns)
    shared = torch.randn(columns, generator=generator)
    shared *= columns**0.5 / shared.norm()
    q += (0.5 - q @ shared[:, None] / columns) * shared  # of all queries the same part along one direction
    k[0] = shared * (2 * SINK * columns**-0.5)
    v[0] = 0.0
    return q, k, v


def with_mean(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """normal(0, 1), but values have mean 1: sums grow with the number of keys."""
    q, k, v = normal(generator, rows, columns)
    return q, k, v + 1.0


INPUTS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "normal": normal, "outliers": outliers, "sink": sink,
}  # fmt: skip


class Operand(NamedTuple):
    """What a product multiplies, float32 (rows, columns), and what its result is multiplied by, (rows, 1)."""

    elements: torch.Tensor
    scale: torch.Tensor


def operand(x: torch.Tensor, format: str | None, scheme: Scheme, axis: str) -> Operand:
    """x (rows, columns) as a kernel gets it. axis: the one that its product sums over."""
    rows, hadamard = len(x), scheme.hadamard and axis == "head_dim"
    if format is None:
        return Operand(x.half().float(), torch.ones(rows, 1))
    own_axis = format in ("mxfp8", "nvfp4")
    found = cute_flash.quantize(
        x.half()[None, :, None],
        format,
        block=None if own_axis else scheme.block,
        axis=axis if own_axis else "head_dim",
        hadamard=hadamard,
    )
    if own_axis:  # tensor cores apply its scales themselves
        return Operand(found.dequantize(rotated=True)[0, :, 0], torch.ones(rows, 1))
    scale = found.scale.flatten().repeat_interleave(scheme.block or rows)[:rows, None]
    return Operand(found.data.float()[0, :, 0], scale)


def attention(
    q: Operand,
    k: Operand,
    v: Operand,
    softmax_scale: float,
    scheme: Scheme,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows of q, columns of v), and the natural log-sum-exp (rows of q, 1). visible: of pairs."""
    if scheme.blackwell:
        return on_blackwell(q, k, v, softmax_scale, scheme.tile, visible)
    rows, lift = len(q.elements), 0 if scheme.v is None else LIFT
    top = torch.full((rows, 1), -math.inf)
    total, outer = torch.zeros(rows, 1), torch.zeros(rows, v.elements.shape[1])
    inner, unit = outer, torch.ones(())  # the tensor core's accumulator, in units of the last tile's scale
    starts = range(0, len(k.elements), scheme.tile)
    for i, start in enumerate(reversed(starts) if scheme.backwards else starts):
        keys = slice(start, start + scheme.tile)
        k_tile = k.elements[keys]
        s = product(torch.zeros(rows, len(k_tile)), q.elements, k_tile, scheme.accumulator)
        s = s * (q.scale * (softmax_scale * math.log2(math.e))) * k.scale[keys].T
        s = s if visible is None else s.masked_fill(~visible[:, keys], -math.inf)
        old, top = top, torch.maximum(top, s.amax(1, keepdim=True))
        shift = top.clamp(min=torch.finfo(torch.float32).min)  # a row without keys so far has -inf
        p = torch.exp2(s - shift + lift)
        p = p.half().float() if scheme.v is None else p.to(torch.float8_e4m3fn).float()
        factor, old_unit, unit = torch.exp2(old - shift), unit, v.scale[start]
        total = total * factor + p.sum(1, keepdim=True)
        outer = outer * factor
        inner = product(inner * (factor * (old_unit / unit)), p, v.elements[keys].T, scheme.accumulator)
        if scheme.promoted and (i + 1) % scheme.promoted == 0:
            outer, inner = outer + inner * unit, torch.zeros_like(inner)
    seen = total > 0
    out = torch.where(seen, (outer + inner * unit) / torch.where(seen, total, 1.0), 0.0)
    return out, (top - lift + total.log2()) * math.log(2.0)


def on_blackwell(
    q: Operand, k: Operand, v: Operand, softmax_scale: float, tile: int, visible: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, in FP8 with all tiles, of so many keys, summed in one place."""
    rows, unit = len(q.elements), torch.zeros(())
    top, total = torch.full((rows, 1), -math.inf), torch.zeros(rows, 1)
    out = torch.zeros(rows, v.elements.shape[1])
    for start in reversed(range(0, len(k.elements), tile)):
        keys = slice(start, start + tile)
        s = q.elements @ k.elements[keys].T
        s = s * (q.scale * (softmax_scale * math.log2(math.e))) * k.scale[keys].T
        s = s if visible is None else s.masked_fill(~visible[:, keys], -math.inf)
        old, raised = top, torch.maximum(top, s.amax(1, keepdim=True))
        top = torch.where(raised - old <= LAG, old, raised)
        shift = top.clamp(min=torch.finfo(torch.float32).min)
        p = torch.exp2(s - shift + (LIFT - LAG))
        old_unit, unit = unit, torch.maximum(unit, v.scale[keys].max())
        factor = torch.exp2(old - shift)
        total = total * factor + p.sum(1, keepdim=True)
        rounded = (p * (v.scale[keys].T / unit)).to(torch.float8_e4m3fn).float()
        out = out * (factor * (old_unit / unit)) + rounded @ v.elements[keys]
    out = torch.where(total > 0, out * unit / torch.where(total > 0, total, 1.0), 0.0)
    return out, (top - (LIFT - LAG) + total.log2()) * math.log(2.0)


def product(start: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulator: str) -> torch.Tensor:
    """start + a bᵀ as tensor cores add them."""
    if accumulator == "float32":
        return start + a @ b.T
    return torch.from_numpy(short_sums.accumulate(*(x.contiguous().numpy() for x in (start, a, b))))


def error(scheme: Scheme, inputs: tuple[torch.Tensor, ...], queries: int) -> tuple[float, float]:
    """(RMSE, relative to the root mean square of the result) of every so many-th query, `queries` of them."""
    q, k, v = inputs
    chosen, softmax_scale = slice(None, None, len(q) // queries), q.shape[1] ** -0.5
    exact = [x.half().double() for x in (q[chosen], k, v)]
    exact = torch.softmax(exact[0] @ exact[1].T * softmax_scale, 1) @ exact[2]
    q8, k8 = (operand(x, scheme.qk, scheme, "head_dim") for x in (q, k))
    v8 = operand(v, scheme.v, scheme, "seqlen")
    out, _ = attention(Operand(*(x[chosen] for x in q8)), k8, v8, softmax_scale, scheme)
    rmse = (out - exact).square().mean().sqrt().item()
    return rmse, rmse / exact.square().mean().sqrt().item()


def schemes() -> Iterator[dict[str, Any]]:
    """A row for every scheme and kind of input."""
    for kind, make in INPUTS.items():
        inputs = make(torch.Generator().manual_seed(1), SEQLEN, HEAD_DIM)
        for name, scheme in SCHEMES.items():
            rmse, relative = error(scheme, inputs, QUERIES)
            yield {"inputs": kind, "scheme": name, "rmse": rmse, "relative": relative}


def accumulators(lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """A row for every accumulator and number of keys, values having a mean."""
    for seqlen in lengths:
        inputs = with_mean(torch.Generator().manual_seed(1), seqlen, HEAD_DIM)
        for name, scheme in ACCUMULATORS.items():
            rmse, relative = error(scheme, inputs, FEW)
            yield {"keys": seqlen, "accumulator": name, "rmse": rmse, "relative": relative}
