"""setp, set and testp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..base.formats import bf16_to_f32, flush
from ..translate.translation import Operation, operation
from .apply import INTEGER_VIEWS, elementwise

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

ORDERED: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
COMBINE: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
FLOATS = {"f16": "f16", "f16x2": "f16x2", "bf16": "u16", "bf16x2": "u16x2", "f32": "f32", "f64": "f64"}
COMPARISONS = (*ORDERED, *UNSIGNED, *UNORDERED, "num", "nan")


def comparison(x: Operation, name: str, kind: str, ftz: bool) -> Callable:
    """A function of two arrays of PTX type `kind` giving bools."""
    if kind not in FLOATS:
        if name in UNORDERED or name in ("num", "nan") or (kind[0] == "b" and name not in ("eq", "ne")):
            raise x.unmodelled(f".{name} with .{kind}")
        return ORDERED[UNSIGNED.get(name, name)]
    if name in UNSIGNED:
        raise x.unmodelled(f".{name} with .{kind}")
    base = ORDERED.get(UNORDERED.get(name, name))

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if kind.startswith("bf16"):
            a, b = bf16_to_f32(a), bf16_to_f32(b)
        if ftz and a.dtype == np.float32:
            a, b = flush(a), flush(b)
        if name == "num":
            return (a == a) & (b == b)
        if name == "nan":
            return (a != a) | (b != b)
        if name in UNORDERED:
            return base(a, b) | (a != a) | (b != b)
        # IEEE says that NaN != NaN holds, PTX's ordered .ne that it does not.
        return base(a, b) & (a == a) & (b == b) if name == "ne" else base(a, b)

    return (
        base
        if base and name in ("eq", "lt", "le", "gt", "ge") and not ftz and kind in ("f32", "f64")
        else compare
    )


@operation("setp")
def setp(x: Operation) -> Callable:
    """p[|q] = (a cmp b) [boolop c]; q gets the combination with the negated comparison."""
    name = x.one_of(*COMPARISONS)
    join = x.one_of(*COMBINE, default="")
    ftz = x.flag("ftz")
    kind = x.type(*(k for k in INTEGER_VIEWS if k[0] != "f"), *FLOATS)
    compare = comparison(x, name, kind, ftz)
    view = FLOATS.get(kind) or INTEGER_VIEWS[kind]
    first, second = x.pair(0)
    a, b = x.source(1, view), x.source(2, view)
    condition = x.predicate(3) if join else None
    p = x.dest_of(first, "pred")
    q = x.dest_of(second, "pred") if second is not None else None
    if join == "" and q is None:

        def simple(m: Machine, g: Threads) -> None:
            rows, at = m.rows[view], g.index
            m.rows["pred"][p][at] = compare(rows[a][at], rows[b][at])

        return simple
    packed = kind in ("f16x2", "bf16x2")

    def full(m: Machine, g: Threads) -> None:
        rows, at = m.rows[view], g.index
        result = compare(rows[a][at], rows[b][at])
        first, second = (result[..., 0], result[..., 1]) if packed else (result, ~result)
        if condition is not None:
            extra = m.rows["pred"][condition[0]][at] ^ condition[1]
            first, second = COMBINE[join](first, extra), COMBINE[join](second, extra)
        m.rows["pred"][p][at] = first
        if q is not None:
            m.rows["pred"][q][at] = second

    if packed and q is None:
        raise x.unmodelled("a packed comparison with one destination")
    return full


@operation("set")
def set_value(x: Operation) -> Callable:
    """d = all ones (or 1.0) where the comparison holds, else 0."""
    name = x.one_of(*COMPARISONS)
    join = x.one_of(*COMBINE, default="")
    ftz = x.flag("ftz")
    result = x.type("u32", "s32", "f32", "u16", "s16", "f16")
    kind = x.type(*(k for k in INTEGER_VIEWS if k[0] != "f"), *FLOATS)
    if kind.endswith("x2"):
        raise x.unmodelled(f".{kind}")
    compare = comparison(x, name, kind, ftz)
    view = FLOATS.get(kind) or INTEGER_VIEWS[kind]
    d, a, b = x.dest(0, result), x.source(1, view), x.source(2, view)
    condition = x.predicate(3) if join else None
    true = 1 if result[0] == "f" else -1

    def step(m: Machine, g: Threads) -> None:
        rows, at = m.rows[view], g.index
        holds = compare(rows[a][at], rows[b][at])
        if condition is not None:
            holds = COMBINE[join](holds, m.rows["pred"][condition[0]][at] ^ condition[1])
        target = m.rows[result][d]
        target[at] = np.where(holds, np.int64(true), 0).astype(target.dtype)

    return step


TESTS: dict[str, Callable] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0),
}


@operation("testp")
def testp(x: Operation) -> Callable:
    """Class of a floating-point number."""
    test = TESTS[x.one_of(*TESTS)]
    return elementwise(x, test, "pred", x.type("f32", "f64"))
