"""Numbers in a call: which types are taken, which values, and what each comes to.

Integers may be Python's, numpy's or torch's symbols. A kernel takes them as int32 and floats as float32,
so what these do not hold is refused; bounds of a window are clamped, for no window is wider than its call.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .arch.expression import LARGEST_POSITION
from .arch.precision import QUANTIZATION_BLOCKS
from .arch.rule import Rule

INT32 = -(2**31), 2**31 - 1
# Scale and softcap: from float32's smallest normal number to its largest power of two, which log2(e) times
# is still finite.
FLOAT32 = 2.0**-126, 2.0**127
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
LARGEST_BOUND = LARGEST_POSITION  # of a window: added to a position it is an int32
LONGEST = LARGEST_POSITION - 1  # sequence: rules, and the kernels' blocks, count its positions in int32
MOST_SPLITS = 128  # parts of the keys

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_INTEGERS = (int, torch.SymInt)


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python, numpy or torch.compile, and no bool."""
    return isinstance(value, (*_INTEGERS, numbers.Integral)) and not isinstance(value, bool)


def integer(value: Any) -> Any:
    """numpy's integers as Python's; torch's symbols stay."""
    return value if isinstance(value, _INTEGERS) else int(value)


def holds(condition: Any) -> bool:
    """Whether a condition on numbers holds.

    Of numbers that torch.compile knows when the graph runs only, such as `lengths.max().item()`, this is true
    and the graph checks it.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(condition):
        return False
    torch._check(condition)
    return True


def length(name: str, value: Any) -> Any:
    """A number of rows, 0 to LONGEST."""
    if not is_integer(value):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); allowed: an int")
    if not (holds(value >= 0) and holds(value <= LONGEST)):
        raise ValueError(f"{name} is {value}; allowed: 0 or more, at most {LONGEST}")
    return integer(value)


def positive(name: str, value: Any) -> Any:
    """A float above 0 that float32 holds."""
    value = _number(name, value)
    if not (holds(value > 0) and holds(value - value == 0)):
        raise ValueError(f"{name} is {value}; allowed: a finite number above 0")
    low, high = FLOAT32
    if not (holds(value >= low) and holds(value <= high)):
        raise ValueError(f"{name} is {value}; allowed: {low:.3g} to {high:.3g}, what float32 holds")
    return float(value)


def not_negative(name: str, value: Any) -> Any:
    """A finite number from 0 on."""
    value = _number(name, value)
    if not (holds(value >= 0) and holds(value - value == 0)):
        raise ValueError(f"{name} is {value}; allowed: a finite number from 0.0 on")
    return value


def softcap(value: Any) -> Any:
    """0.0 for none, or as `positive`."""
    return positive("softcap", value) if not_negative("softcap", value) else 0.0


def _number(name: str, value: Any) -> Any:
    """numpy's numbers as Python's, in whose precision they are compared; all others as they are."""
    if isinstance(value, bool) or not isinstance(value, (*_NUMBERS, numbers.Real)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); allowed: a number")
    return value if isinstance(value, _NUMBERS) else float(value)


def quantization_block(value: Any) -> int | None:
    """Rows that share a scale, or None: all of a sequence do."""
    if value is not None and (type(value) is not int or value not in QUANTIZATION_BLOCKS):
        allowed = ", ".join(map(str, (None, *QUANTIZATION_BLOCKS)))
        raise ValueError(f"quantization_block is {value!r}; allowed: {allowed}")
    return value


def num_splits(given: Any, deterministic: bool) -> Any:
    """In how many parts to take the keys; 0 leaves it open.

    Deterministic calls take them whole: as many parts as fill the GPU depend on all that is in the call, and
    where parts begin under a mask, on the other queries of a tile.
    """
    if given is None:
        given = 0
    if not is_integer(given):
        raise TypeError(f"num_splits is {given!r} ({type(given).__name__}); allowed: an int, or None")
    if not 0 <= given <= MOST_SPLITS:
        raise ValueError(f"num_splits is {given}; allowed: 1 to {MOST_SPLITS}, or 0 or None to leave it open")
    return 1 if deterministic and given == 0 else integer(given)


def window(given: Any, rows_q: Any, rows_k: Any) -> tuple[Any, Any]:
    """(left, right) with None for unbounded.

    A query has fewer than `rows_k` keys before it and fewer than `rows_q` after it: a bound that could bring
    a position out of int32 is clamped to that.
    """
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"window_size is {given!r}; allowed: (left, right), -1 or None for unbounded")
    for bound in given:
        if bound is not None and not is_integer(bound):
            raise TypeError(f"window_size is {given!r}; allowed: ints, or None for unbounded")
        if bound is not None and bound < -1:
            raise ValueError(f"window_size is {given!r}; allowed: 0 or more, -1 or None for unbounded")
    left, right = given
    return _clamped(left, rows_k), _clamped(right, rows_q)


def _clamped(bound: Any, rows: Any) -> Any:
    if bound is None or bound == -1:
        return None
    bound = integer(bound)
    if bound <= LARGEST_BOUND:
        return bound
    return torch.sym_min(bound, rows) if torch.compiler.is_compiling() else min(bound, rows)


def check_values(parts: Iterable[Rule | str], ints: list, floats: list) -> None:
    """The numbers that rules hand to a kernel fit it: ValueError names the field of one that does not."""
    if all(map(_fits_int32, ints)) and all(map(fits_float32, floats)):
        return
    for name, value in (found for part in parts for found in _fields(part)):
        if isinstance(value, float) and not fits_float32(value):
            held = f"{FLOAT32[0]:.3g} to {LARGEST_FLOAT32:.3g}, what float32 holds"
            raise ValueError(f"{name} is {value}; allowed: 0, or a size from {held}")
        if is_integer(value) and not _fits_int32(value):
            raise ValueError(f"{name} is {value}; allowed: {INT32[0]} to {INT32[1]}, what int32 holds")


def _fits_int32(value: Any) -> bool:
    if type(value) is int:
        return INT32[0] <= value <= INT32[1]
    return holds(value >= INT32[0]) and holds(value <= INT32[1])


def fits_float32(value: Any) -> bool:
    """Neither a finite number that becomes infinite nor one that becomes 0 or is rounded as a subnormal."""
    return value == 0 or value - value != 0 or FLOAT32[0] <= abs(value) <= LARGEST_FLOAT32


def _fields(part: Rule | str) -> Iterator[tuple[str, Any]]:
    """("Class.field", value) of a rule and of the rules inside it."""
    for field in () if isinstance(part, str) else type(part).__match_args__:
        value = getattr(part, field)
        yield f"{type(part).__name__}.{field}", value
        for nested in value if isinstance(value, tuple) else (value,):
            if isinstance(nested, Rule):
                yield from _fields(nested)
