"""cvt to and from floats of eight bits and fewer, two at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.formats import CANONICAL_NAN, bf16_to_f32, f32_to_bf16
from ..base.narrow_floats import E2M1, FORMATS, UE8M0, to_ue8m0
from ..translate.translation import Operation

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

PAIRS = tuple(f"{name}x2" for name in FORMATS)
SCALES = "ue8m0x2"
NARROW = (*PAIRS, SCALES)
_NAN = np.array(CANONICAL_NAN[16], np.uint16).view(np.float16)


def to_narrow(x: Operation, to: str, mode: str, flags: tuple[bool, bool], source: str) -> Callable:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b (a goes to the upper half) and .f16x2 d, a; ue8m0x2 likewise.

    flags: (.satfinite, .relu) as given.
    """
    satfinite, relu = flags
    scales = to == SCALES
    if not satfinite or mode not in (("rz", "rp") if scales else ("rn",)) or (scales and relu):
        raise x.unmodelled(f"this form of a conversion to .{to}")
    if source not in ("f32", "bf16x2" if scales else "f16x2"):
        raise x.unmodelled(f".{to} from .{source}")
    read = _sources(x, source)
    if to == "e2m1x2":
        d, view, shift = x.dest(0, "u8"), "u8", 4
    else:
        d, view, shift = x.dest(0, "u16"), "u16", 8
    encode = (lambda v: to_ue8m0(v, mode)) if scales else FORMATS[to[:-2]].encode

    def step(m: Machine, g: Threads) -> None:
        upper, lower = (encode(_relu(v) if relu else v) for v in read(m, g))
        target = m.rows[view][d]
        target[g.index] = lower.astype(target.dtype) | upper.astype(target.dtype) << target.dtype.type(shift)

    return step


def _relu(values: np.ndarray) -> np.ndarray:
    """Negative numbers and -0 become 0; NaN stays."""
    return np.where(np.isnan(values), values, np.where(values > 0, values, 0.0))


def _sources(x: Operation, source: str) -> Callable:
    """A function (machine, threads) -> (upper, lower) numbers as float64."""
    if source == "f32":
        a, b = x.source(1, "f32"), x.source(2, "f32")
        return lambda m, g: tuple(m.rows["f32"][row][g.index].astype(np.float64) for row in (a, b))
    view = "f16x2" if source == "f16x2" else "u16x2"
    a = x.source(1, view)

    def halves(m: Machine, g: Threads) -> tuple[np.ndarray, np.ndarray]:
        pair = m.rows[view][a][g.index]
        wide = (pair if view == "f16x2" else bf16_to_f32(pair)).astype(np.float64)
        return wide[..., 1], wide[..., 0]

    return halves


def from_narrow(x: Operation, to: str, mode: str, relu: bool, source: str) -> Callable:
    """cvt.rn.f16x2.e4m3x2 d, a and cvt.rn.bf16x2.ue8m0x2 d, a: the upper half stays the upper half."""
    if to != ("bf16x2" if source == SCALES else "f16x2") or mode != "rn" or (relu and source == SCALES):
        raise x.unmodelled(f".{to} from .{source}")
    have = "u8" if source == "e2m1x2" else "u16"
    d, a = x.dest(0, "u16x2" if source == SCALES else "f16x2"), x.source(1, have)
    if source == SCALES:
        table = f32_to_bf16(UE8M0)
    elif source == "e2m1x2":
        table = E2M1.astype(np.float16)
    else:
        table = FORMATS[source[:-2]].table.astype(np.float16)

    def step(m: Machine, g: Threads) -> None:
        word = m.rows[have][a][g.index]
        if have == "u8":
            pair = table[word]
        else:
            pair = table[np.stack([word & np.uint16(0xFF), word >> np.uint16(8)], axis=-1)]
        if source != SCALES:
            pair = np.where(np.isnan(pair), _NAN, pair)
            if relu:
                pair = np.where(pair > 0, pair, np.where(np.isnan(pair), pair, np.float16(0)))
        m.rows["u16x2" if source == SCALES else "f16x2"][d][g.index] = pair

    return step
