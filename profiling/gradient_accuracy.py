"""What FP8 costs gradients: a model of the kernels' arithmetic, in plain torch, and of what it might be.

    S = Q Kᵀ, dP = dO Vᵀ     of e4m3 with a scale for a head, q and k rotated
    dV = Pᵀ dO               P lifted by 2**P_LIFT, in e4m3
    dS = P (dP - delta)      delta of O as the forward pass has it, and of dO as dP has it, or as it was given
    dK = dSᵀ Q, dQ = dS K    Q and K as they were multiplied; dS in e5m2, brought into its range by a power of
                             two; or in bfloat16; in MXFP8 once for each product, whose scales lie along its
                             sum; in e4m3 with one scale for a tile

Sums are those of float32; O, for delta, has 16 bits. A tile's scale is that of its largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from cute_flash.arch.quantized_backward import DS_LIFT, P_LIFT
from cute_flash.rotation import Rotation

from . import accuracy
from .accuracy import TILE, Operand, Scheme, normal, operand

SEQLEN, HEAD_DIM = 2048, 128
GROUP = 32  # numbers of MXFP8 that share a scale
LARGEST = 448.0  # of e4m3
GRADIENTS = ("dq", "dk", "dv")
STORED = Scheme(hadamard=True)  # what the forward pass has multiplied

TABLE = f"""\
Errors of gradients relative to the gradient, in percent, {SEQLEN} queries and keys, head dim {HEAD_DIM}, no
mask; `profiling/gradient_accuracy.py` says what is computed, `profiling/fp8_backward.md` why. dO is of the
same kind as v. Dominated: every second query has one key whose score is some 12 above the others'. FP8: q,
k, v, dO and P in e4m3, dS in e5m2, O of the forward pass on sm100; the kernels are the first of these.
"""


def in_e5m2(ds: torch.Tensor) -> torch.Tensor:
    """(rows, columns), of which products sum over columns, in units of dP's operands; rounded."""
    return (ds * 2.0**DS_LIFT).clamp(-57344.0, 57344.0).to(torch.float8_e5m2).float() * 2.0**-DS_LIFT


def in_bfloat16(ds: torch.Tensor) -> torch.Tensor:
    """The same in 16 bits."""
    return ds.bfloat16().float()


def in_mxfp8(ds: torch.Tensor) -> torch.Tensor:
    """The same with a power of two for each 32 columns, the least by which nothing saturates."""
    groups = ds.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2((largest / LARGEST).log2().ceil())
    return (in_e4m3(groups / scale) * scale).flatten(1)


def by_tiles(ds: torch.Tensor) -> torch.Tensor:
    """The same with a scale for each tile of rows and columns."""
    tiles = ds.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    scale = tiles.abs().amax((1, 3), keepdim=True).clamp(min=2.0**-100) / LARGEST
    return (in_e4m3(tiles / scale) * scale).flatten(2).flatten(0, 1)


def in_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def dominated(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """normal(0, 1), but every second query has one key whose score is some 12 above the others'."""
    q, k, v = normal(generator, rows, columns)
    keys = k[torch.randint(0, rows, (rows // 2,), generator=generator)]
    q[::2] = 0.3 * q[::2] + keys * (12.0 * columns**0.5 / keys.square().sum(1, keepdim=True))
    return q, k, v


INPUTS = accuracy.INPUTS | {"dominated": dominated}


class Rounding(NamedTuple):
    """ds: rounded for a product that sums over its columns. stored: whether delta is of dO as dP has it.

    forward: how O is computed; None: P is not rounded.
    """

    ds: Callable[[torch.Tensor], torch.Tensor] = in_e5m2
    stored: bool = True
    forward: Scheme | None = Scheme(blackwell=True)


# None: all operands have 16 bits.
SCHEMES: dict[str, Rounding | None] = {
    "16 bits": None,
    "FP8": Rounding(),
    "FP8, O of sm90": Rounding(forward=Scheme()),
    "FP8, O of a P that is not rounded": Rounding(forward=None),
    "FP8, delta of dO as given": Rounding(stored=False),
    "FP8, dS in 16 bits": Rounding(in_bfloat16),
    "FP8, dS in MXFP8": Rounding(in_mxfp8),
    "FP8, dS in e4m3 with a scale for each tile": Rounding(by_tiles),
}


def exact(
    q, k, v, dout, softmax_scale: float, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) in float64 of the same 16-bit numbers."""
    q, k, v, dout = (x.half().double() for x in (q, k, v, dout))
    s = q @ k.T * softmax_scale
    p = torch.softmax(s if visible is None else s.masked_fill(~visible, -torch.inf), 1)
    dp = dout @ v.T
    ds = p * (dp - (p * dp).sum(1, keepdim=True)) * softmax_scale
    return ds @ k, ds.T @ q, p.T @ dout


def of_16_bits(q, k, v, dout, softmax_scale: float) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) as kernels of 16 bits compute them."""
    q, k, v, dout = (x.half().float() for x in (q, k, v, dout))
    p = torch.softmax(q @ k.T * softmax_scale, 1)
    delta = (dout * (p.half().float() @ v).half()).sum(1, keepdim=True)
    ds = (p * (dout @ v.T - delta)).half().float()
    return ds @ k * softmax_scale, ds.T @ q * softmax_scale, p.half().float().T @ dout


def of_8_bits(
    q, k, v, dout, softmax_scale: float, rounding: Rounding, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) of q, k, v and dO (rows, columns) of one head. visible: (rows, keys) bool."""
    q8, k8 = (operand(x, "e4m3", STORED, "head_dim") for x in (q, k))
    v8, dout8 = (operand(x, "e4m3", STORED, "seqlen") for x in (v, dout))
    s = product(q8, k8) * softmax_scale
    s = s if visible is None else s.masked_fill(~visible, -torch.inf)
    lse = s.logsumexp(1, keepdim=True)
    out = torch.exp(s - lse) @ (v8.elements * v8.scale)
    if rounding.forward is not None:
        out, lse = accuracy.attention(q8, k8, v8, softmax_scale, rounding.forward, visible)
    p, unit = torch.exp(s - lse), v8.scale[0] * dout8.scale[0]
    of_delta = dout8.elements * dout8.scale if rounding.stored else dout.half().float()
    delta = (of_delta * out.half()).sum(1, keepdim=True)
    ds = p * (dout8.elements @ v8.elements.T - delta / unit)
    dv = in_e4m3(p * 2.0**P_LIFT).T @ dout8.elements * (dout8.scale[0] * 2.0**-P_LIFT)
    dq = rounding.ds(ds) @ k8.elements * (k8.scale[0] * unit * softmax_scale)
    dk = rounding.ds(ds.T) @ q8.elements * (q8.scale[0] * unit * softmax_scale)
    rotation = Rotation(q.shape[1], 0)
    return rotation.undo(dq), rotation.undo(dk), dv


def product(a: Operand, b: Operand) -> torch.Tensor:
    """a bᵀ, as if they had not been divided by their scales."""
    return a.elements @ b.elements.T * a.scale * b.scale.T


def errors(kind: str, scheme: str) -> dict[str, float]:
    """Of each gradient, relative to its root mean square."""
    make, rounding = INPUTS[kind], SCHEMES[scheme]
    generator = torch.Generator().manual_seed(1)
    dout = make(generator, SEQLEN, HEAD_DIM)[2]
    inputs = *make(generator, SEQLEN, HEAD_DIM), dout, HEAD_DIM**-0.5
    found = of_16_bits(*inputs) if rounding is None else of_8_bits(*inputs, rounding)
    pairs = zip(GRADIENTS, found, exact(*inputs), strict=True)
    return {name: ((x - y).square().mean() / y.square().mean()).sqrt().item() for name, x, y in pairs}


def rows() -> Iterator[dict[str, Any]]:
    """One for every scheme, kind of input and gradient."""
    for kind in INPUTS:
        for scheme in SCHEMES:
            for name, relative in errors(kind, scheme).items():
                yield {"inputs": kind, "scheme": scheme, "gradient": name, "relative": relative}


def markdown(data: list[dict[str, Any]]) -> list[str]:
    """The table's lines."""
    columns = [(kind, name) for kind in INPUTS for name in GRADIENTS]
    lines = [
        "## Gradients", "", *TABLE.splitlines(), "",
        f"| scheme | {' | '.join(f'{kind}: {name}' for kind, name in columns)} |",
        f"| --- |{' --: |' * len(columns)}",
    ]  # fmt: skip
    for scheme in SCHEMES:
        found = {(row["inputs"], row["gradient"]): row["relative"] for row in data if row["scheme"] == scheme}
        lines.append(f"| {scheme} | {' | '.join(f'{100 * found[at]:.2f}' for at in columns)} |")
    return lines
