"""cvt: conversions between integers and floating-point formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.formats import (
    CANONICAL_NAN,
    bf16_to_f32,
    f32_to_bf16,
    flush,
    round_f32,
    saturate,
    sticky_sum,
    to_odd_f32,
)
from ..translate.translation import Operation, operation
from .convert_narrow import NARROW, from_narrow, to_narrow

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = {"f16": "f16", "bf16": "u16", "f32": "f32", "f64": "f64"}
TO_INTEGER: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDINGS = ("rn", "rna", "rz", "rm", "rp", *TO_INTEGER)
_NAN_F16 = np.array(CANONICAL_NAN[16], np.uint16).view(np.float16)
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
# The largest finite numbers of what .satfinite is for.
LARGEST = {
    name: np.array(bits, np.uint32).view(np.float32)
    for name, bits in (("f16", 0x477FE000), ("bf16", 0x7F7F0000), ("tf32", 0x7F7FE000))
}


def _dtype(kind: str) -> np.dtype:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


def _from_float(values: np.ndarray, kind: str) -> np.ndarray:
    """A float kind's register values as float64, exact."""
    return (bf16_to_f32(values) if kind == "bf16" else values).astype(np.float64)


def _to_float(exact: np.ndarray, kind: str, mode: str, relu: bool = False) -> np.ndarray:
    """float64 (exact or sticky) rounded to a float kind, as its view holds it."""
    if relu:
        exact = np.where(exact > 0, exact, np.where(np.isnan(exact), exact, 0.0))
    if kind == "f64":
        return exact
    if kind == "f32":
        return round_f32(exact, mode)
    if kind == "bf16":
        return f32_to_bf16(to_odd_f32(exact), mode)
    near = exact.astype(np.float16)
    if mode == "rz":
        outside = np.abs(near.astype(np.float64)) > np.abs(exact)
        near = np.where(outside, np.nextafter(near, np.float16(0)), near)
    nan = exact != exact
    return np.where(nan, _NAN_F16, near) if np.count_nonzero(nan) else near


def float_to_integer(values: np.ndarray, kind: str, mode: str, from_f64: bool) -> np.ndarray:
    """float64 -> integer of `kind`, rounded by mode and clamped to its range.

    NaN gives 0; with a 64-bit source or result it gives the top bit alone, as PTX says.
    """
    info = np.iinfo(_dtype(kind))
    whole = TO_INTEGER[mode](values)
    nan = np.isnan(values)
    low, high = whole <= float(info.min), whole >= float(info.max)
    inside = np.where(nan | low | high, 0.0, whole)
    result = inside.astype(np.int64) if info.max < 2**63 else _to_u64(inside)
    result = result.astype(info.dtype)
    result = np.where(low, info.dtype.type(info.min), np.where(high, info.dtype.type(info.max), result))
    wide = from_f64 or info.bits == 64
    missing = np.array(1 << info.bits - 1, np.dtype(f"u{info.bits // 8}")).view(info.dtype) if wide else 0
    return np.where(nan, missing, result).astype(info.dtype)


def _to_u64(whole: np.ndarray) -> np.ndarray:
    top = whole >= 2.0**63
    return np.where(top, whole - 2.0**63, whole).astype(np.int64).view(np.uint64) + (
        top.astype(np.uint64) << np.uint64(63)
    )


def integer_to_float(values: np.ndarray) -> np.ndarray:
    """Integers of any width as float64: exact, or sticky where 53 bits do not suffice."""
    if values.dtype.itemsize < 8:
        return values.astype(np.float64)
    high = (values >> values.dtype.type(32)).astype(np.float64) * 2.0**32
    low = (values & values.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return sticky_sum(high, low)


@operation("cvt")
def cvt(x: Operation) -> Callable:
    """Every scalar conversion, and the packed ones."""
    mode = x.one_of(*ROUNDINGS, default="")
    ftz, sat, relu = x.flag("ftz"), x.flag("sat"), x.flag("relu")
    satfinite = x.flag("satfinite")
    to = x.type(*INTEGERS, *FLOATS, *PACKED, "tf32", *NARROW)
    source = x.type(*INTEGERS, *FLOATS, *PACKED, *NARROW)
    if (ftz or sat) and (to in NARROW or source in NARROW):
        raise x.unmodelled(".ftz or .sat here")
    if to in NARROW:
        return to_narrow(x, to, mode, (satfinite, relu), source)
    if source in NARROW and not satfinite:
        return from_narrow(x, to, mode, relu, source)
    if source in PACKED:
        raise x.unmodelled(f".{to} from .{source}")
    if satfinite and (source != "f32" or PACKED.get(to, to) not in LARGEST):
        raise x.unmodelled(".satfinite with these types")
    if (ftz or sat) and (satfinite or to in PACKED or to == "tf32"):
        raise x.unmodelled(".ftz or .sat with these types")
    if to in PACKED:
        return _packed(x, PACKED[to], mode, (satfinite, relu), source)
    if to == "tf32":
        return _tf32(x, mode, (satfinite, relu), source)
    if relu and to not in ("f16", "bf16"):
        raise x.unmodelled(f".relu with .{to}")
    function = _conversion(x, to, source, mode, relu)
    if satfinite:
        function = _finite(function, to)
    view = FLOATS.get(source, source)
    a, have = x.wide_source(1, view)
    d, width = x.wide_dest_of(x.operand(0), FLOATS.get(to, to))
    return _step(function, (a, have, view), (d, width, to), (ftz, sat))


def _conversion(x: Operation, to: str, source: str, mode: str, relu: bool) -> Callable:
    """The function from source-typed arrays to arrays as `to`'s view holds them."""
    if source in INTEGERS and to in INTEGERS:
        if mode:
            raise x.unmodelled(f".{mode} between integers")
        return lambda a: a.astype(_dtype(to))
    if source in INTEGERS:
        if mode not in ("rn", "rz", "rm", "rp"):
            raise x.unmodelled("this rounding")
        _check_mode(x, to, mode)
        if to == "f64":
            return lambda a: a.astype(np.float64)
        return lambda a: _to_float(integer_to_float(a), to, mode)
    if to in INTEGERS:
        if mode not in TO_INTEGER:
            raise x.unmodelled("a conversion to an integer without an integer rounding")
        return lambda a: float_to_integer(_from_float(a, source), to, mode, source == "f64")
    if mode in TO_INTEGER:
        if to != source:
            raise x.unmodelled(f".{mode} between these types")
        return lambda a: _to_float(TO_INTEGER[mode](_from_float(a, source)), to, "rn")
    _check_mode(x, to, mode or "rn")
    return lambda a: _to_float(_from_float(a, source), to, mode or "rn", relu)


def _finite(function: Callable, to: str) -> Callable:
    """A conversion after which numbers beyond the format's largest one have become that one (.satfinite)."""
    most = LARGEST[to]
    return lambda a: function(np.clip(a, -most, most))


def _check_mode(x: Operation, to: str, mode: str) -> None:
    allowed = {"f16": ("rn", "rz"), "bf16": ("rn", "rz"), "f32": ("rn", "rz", "rm", "rp"), "f64": ("rn",)}
    if mode not in allowed[to]:
        raise x.unmodelled(f".{mode} to .{to}")


def _step(function: Callable, source: tuple, dest: tuple, flags: tuple) -> Callable:
    """Read, maybe from a wider register; convert; clamp; write, maybe extended into a wider register."""
    a, have, view = source
    d, width, to = dest
    ftz, sat = flags
    narrow = np.dtype(_NUMPY[view])
    target_view = FLOATS.get(to, to) if width == _BITS[to] else f"{'s' if to[0] == 's' else 'u'}{width}"

    def step(m: Machine, g: Threads) -> None:
        at = g.index
        value = m.rows[have][a][at]
        if have != view:
            value = value.astype(f"u{narrow.itemsize}").view(narrow)
        if ftz and value.dtype == np.float32:
            value = flush(value)
        result = _saturated(value, to) if sat and to in INTEGERS and view in INTEGERS else function(value)
        if ftz and result.dtype == np.float32:
            result = flush(result)
        if sat and to in FLOATS:
            result = f32_to_bf16(saturate(bf16_to_f32(result))) if to == "bf16" else saturate(result)
        if to in FLOATS and width != _BITS[to]:
            result = result.view(f"u{result.dtype.itemsize}")
        m.rows[target_view][d][at] = result

    return step


_BITS = {kind: int(kind.lstrip("usbf")) for kind in (*INTEGERS, *FLOATS)}
_NUMPY = {"f16": "f2", "f32": "f4", "f64": "f8"} | {k: _dtype(k).str for k in INTEGERS}


def _saturated(value: np.ndarray, to: str) -> np.ndarray:
    """Integer to integer with clamping."""
    have, want = np.iinfo(value.dtype), np.iinfo(_dtype(to))
    low, high = max(have.min, want.min), min(have.max, want.max)
    return np.clip(value, low, high).astype(want.dtype)


def _packed(x: Operation, scalar: str, mode: str, flags: tuple[bool, bool], source: str) -> Callable:
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half, b to the lower. flags: (.satfinite, .relu)."""
    satfinite, relu = flags
    if source != "f32" or mode not in ("rn", "rz"):
        raise x.unmodelled(f".{mode} from .{source}")
    view = "f16x2" if scalar == "f16" else "u16x2"
    d, a, b = x.dest(0, view), x.source(1, "f32"), x.source(2, "f32")
    direct = scalar == "bf16" and not relu

    def convert(value: np.ndarray) -> np.ndarray:
        if direct:
            return f32_to_bf16(value, mode)
        return _to_float(value.astype(np.float64), scalar, mode, relu)

    if satfinite:
        convert = _finite(convert, scalar)

    def step(m: Machine, g: Threads) -> None:
        at, rows = g.index, m.rows["f32"]
        target = m.rows[view][d]
        packed = np.empty((*g.shape, 2), target.dtype)
        packed[..., 0] = convert(rows[b][at])
        packed[..., 1] = convert(rows[a][at])
        target[at] = packed

    return step


def _tf32(x: Operation, mode: str, flags: tuple[bool, bool], source: str) -> Callable:
    """cvt.rna.tf32.f32: 10 mantissa bits, ties away from zero; rn ties to even, rz cuts.

    flags: (.satfinite, .relu).
    """
    satfinite, relu = flags
    if source != "f32" or mode not in ("rna", "rn", "rz") or (relu and mode == "rna"):
        raise x.unmodelled(f".{mode} from .{source}")
    most = LARGEST["tf32"]
    d, a = x.dest(0, "u32"), x.source(1, "u32")
    low = np.uint32(0x1FFF)

    def step(m: Machine, g: Threads) -> None:
        rows, at = m.rows["u32"], g.index
        bits = rows[a][at]
        if satfinite or relu:
            value = bits.view(np.float32)
            low_end, high_end = np.float32(0) if relu else -most, most if satfinite else np.float32(np.inf)
            bits = np.where(value == 0, np.abs(value) if relu else value, value.clip(low_end, high_end))
            bits = bits.view(np.uint32)
        half = {
            "rna": np.uint32(0x1000),
            "rn": np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1)),
            "rz": np.uint32(0),
        }[mode]
        special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        rounded = (bits + half) & ~low
        rows[d][at] = np.where(special, np.where(bits << np.uint32(9), np.uint32(0x7FFFFFFF), bits), rounded)

    return step
