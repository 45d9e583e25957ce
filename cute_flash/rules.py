"""From what a user says about pairs of query and key to one mask and one score inside an operator.

    mask_of, score_of   arguments of the interface -> the rules that apply together
    encode              rules -> a string and lists of numbers and tensors: what an operator can take
    decode, values      the same, inside the operator
    seen                rules -> what that string depends on, and the values: for calls that are remembered

The string is the text of the two expressions (`arch.rule.traced`): whoever keeps it, a compiled graph or a
file, has all of the rules but the values.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import scalars
from .arch.common.mask import Both, Causal, Mask, SlidingWindow
from .arch.common.score import ALiBi, Chain, Score, Softcap
from .arch.expression import LARGEST_POSITION, Expression, expression
from .arch.rule import Rule, RuleType, describe, ships, traced

_SHORT = reprlib.Repr()
_SHORT.maxother = 60
_BETWEEN = "\n\n"  # the mask's text and the score's


class Seen(NamedTuple):
    """A user's mask and score as a call shows them. key: where it is equal, so are their texts.

    mask, score: their run-time values. tensors: those among them.
    """

    key: tuple
    mask: tuple
    score: tuple
    tensors: list[torch.Tensor]


class Encoded(NamedTuple):
    """Rules as an operator takes them: expressions as text, run-time values by kind, the mask's first."""

    code: str
    tensors: list[torch.Tensor]
    ints: list[int]
    floats: list[float]


@dataclass(frozen=True)
class MaskFunction(Mask):
    """The mask that a plain function is."""

    function: Callable

    def visible(self, q, k):
        return self.function(q, k)


@dataclass(frozen=True)
class ScoreFunction(Score):
    """The score that a plain function is."""

    function: Callable

    def score(self, s, batch, head, q, k):
        return self.function(s, batch, head, q, k)


def mask_of(causal: bool, window: tuple[int | None, int | None], mask: Any) -> list[Rule]:
    """Masks that must all show a pair. window: (left, right), None for unbounded; causal is right = 0."""
    left, right = window
    if causal:
        right = 0
    parts: list[Rule] = []
    if left is None and right == 0:
        parts.append(Causal())
    elif left is not None or right is not None:
        parts.append(SlidingWindow(left, right))
    if mask is not None:
        parts.append(part_of(mask, Mask, "mask"))
    return parts


def score_of(softcap: float, alibi_slopes: torch.Tensor | None, score: Any) -> list[Rule]:
    """Softcap, then ALiBi, then the user's rule, to be applied in this order."""
    parts: list[Rule] = []
    if softcap:
        parts.append(Softcap(softcap))
    if alibi_slopes is not None:
        parts.append(ALiBi(alibi_slopes))
    if score is not None:
        parts.append(part_of(score, Score, "score"))
    return parts


def part_of(value: Any, base: type[Rule], argument: str) -> Rule:
    """`value` if it is a rule; if it is a plain function, the rule that it makes."""
    if isinstance(value, base):
        return value
    method = "visible(q, k)" if base is Mask else "score(s, batch, head, q, k)"
    if not isinstance(value, types.FunctionType):
        given = f"{_SHORT.repr(value)} ({type(value).__name__})"
        raise TypeError(
            f"{argument} is {given}; allowed: a {base.__name__} object, or a plain function {method}"
        )
    wanted = ("q", "k") if base is Mask else ("s", "batch", "head", "q", "k")
    code = value.__code__
    takes_more = code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if code.co_argcount != len(wanted) or takes_more:
        name = f"{value.__qualname__}{inspect.signature(value)}"
        raise TypeError(f"{argument} is {name}; allowed: a function of ({', '.join(wanted)})")
    return MaskFunction(value) if base is Mask else ScoreFunction(value)


def encode(masks: list[Rule], scores: list[Rule]) -> Encoded:
    """Rules as an operator's arguments. TypeError where a rule cannot be traced or a field cannot travel."""
    pools: tuple[list, list, list] = ([], [], [])
    mask = functools.reduce(Both, masks) if masks else None
    score = Chain(tuple(scores)) if len(scores) > 1 else scores[0] if scores else None
    return Encoded(f"{_encode(mask, pools)}{_BETWEEN}{_encode(score, pools)}", *pools)


def seen(mask: Any, score: Any) -> Seen:
    """What tells a user's mask and score, either of which may be None, from those of other calls.

    Rules that ship are told by their class and the types of their fields, without a text; so are functions
    by their code, where it says all. Raises what `part_of`, `encode` and `scalars.check_values` do.
    """
    mask_values: list = []
    score_values: list = []
    tensors: list[torch.Tensor] = []
    key = (
        None if mask is None else _seen(mask, Mask, (mask_values, tensors)),
        None if score is None else _seen(score, Score, (score_values, tensors)),
    )
    return Seen(key, tuple(mask_values), tuple(score_values), tensors)


def _seen(given: Any, base: type[Rule], into: tuple[list, list]) -> Hashable:
    """What the text of a rule depends on, or that text. into: where its values go, and tensors among them."""
    cls = given.__class__
    if cls is types.FunctionType and _is_closed(given):
        return given.__code__
    if ships(cls):
        found: tuple[list, list] = ([], [])
        kinds = _kinds(given, found)
        if kinds is not None:
            into[0].extend(found[0])
            into[1].extend(found[1])
            return kinds
    rule = part_of(given, base, base.__name__.lower())
    kind, values = describe(rule)
    text, pool_of = _SHIPPED.get(kind) or _traced(kind, compiling=False)
    tensors, ints, floats = (
        [value for value, at in zip(values, pool_of, strict=True) if at == pool] for pool in range(3)
    )
    scalars.check_values([rule], ints, floats)
    into[0].extend(values)
    into[1].extend(tensors)
    return cls, text


def _kinds(rule: Rule, into: tuple[list, list]) -> tuple | None:
    """The class of a rule that ships and, by field, what its type depends on; None for what is unusual."""
    rule = rule.form()
    kinds: list = [rule.__class__]
    for name in rule.__match_args__:
        value = getattr(rule, name)
        kind: Any = value.__class__
        if kind is torch.Tensor:
            into[1].append(value)
            kind = (value.dtype, value.ndim)
        elif kind is int:
            if not -LARGEST_POSITION <= value <= LARGEST_POSITION:
                return None
        elif kind is float:
            if not scalars.fits_float32(value):
                return None
        elif value is None:
            kinds.append(None)
            continue
        elif isinstance(value, Rule) and ships(kind):
            kind = _kinds(value, into)
            if kind is None:
                return None
            kinds.append(kind)
            continue
        else:
            return None
        into[0].append(value)
        kinds.append(kind)
    return tuple(kinds)


def _encode(rule: Rule | None, pools: tuple[list, list, list]) -> str:
    """The text of a rule; its values are appended to the pools of tensors, ints and floats."""
    if rule is None:
        return ""
    compiling = torch.compiler.is_compiling()
    if not compiling and type(rule) in (MaskFunction, ScoreFunction) and _is_closed(rule.function):
        return _text_of_code(type(rule), rule.function.__code__)
    kind, found = describe(rule)
    shipped = None if compiling else _SHIPPED.get(kind)
    text, pool_of = shipped or _traced(kind, compiling)
    for pool, value in zip(pool_of, found, strict=True):
        pools[pool].append(value)
    return text


# Type of a rule that ships -> its text, and the pool of each of its values.
_SHIPPED: dict[RuleType, tuple[str, tuple[int, ...]]] = {}
_KNOWN: dict[tuple[str, ...], list[str]] = {}  # see `traced`


def _traced(kind: RuleType, compiling: bool) -> tuple[str, tuple[int, ...]]:
    """The text of rules of a type, and the pool of each of their values."""
    if compiling:
        # torch.compile guards on what tracing looks at, but for what a class has from a function around it.
        for cls in kind.classes():
            _check_closures(cls)
    known = None if compiling else _KNOWN
    result = traced(kind, known), tuple([_POOL.get(leaf, 0) for leaf in kind.leaves()])
    if not compiling and kind.ships():
        _SHIPPED[kind] = result
    return result


def _is_closed(function: types.FunctionType) -> bool:
    """Whether a function uses only its arguments and constants: its code then says what it computes."""
    code = function.__code__
    outside = code.co_names or function.__closure__ or function.__defaults__ or function.__kwdefaults__
    inside = any(isinstance(constant, types.CodeType) for constant in code.co_consts)
    return not outside and not inside


@functools.lru_cache(maxsize=4096)
def _text_of_code(kind: type[MaskFunction | ScoreFunction], code: types.CodeType) -> str:
    """The text of a function that `_is_closed`."""
    return traced(describe(kind(types.FunctionType(code, {}, code.co_name)))[0])


def _check_closures(cls: type[Rule]) -> None:
    """TypeError for a class whose methods use values of an enclosing function."""
    for base in cls.__mro__:
        for member in vars(base).values():
            if _enclosed(inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))):
                raise TypeError(
                    f"{cls.__qualname__} uses values of the function around it; within torch.compile it "
                    "would not see them change: make them its fields"
                )


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo here.
_check_closures._dynamo_marked_constant = True


def _enclosed(value: Any) -> bool:
    """Whether a function, or one that it uses, has a number or text from an enclosing function."""
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return any(isinstance(cell, (int, float, str, tuple)) or _enclosed(cell) for cell in cells)


_POOL = {"int": 1, "int64": 1, "float": 2}


@functools.lru_cache(maxsize=4096)
def decode(code: str) -> tuple[Expression | None, Expression | None]:
    """What mask and score compute, as `encode` wrote it."""
    mask, _, score = code.partition(_BETWEEN)
    return expression(mask) if mask else None, expression(score) if score else None


def values(code: str, tensors: Sequence, ints: Sequence, floats: Sequence) -> list[tuple | None]:
    """The run-time values of the mask and of the score, in the order of their leaves; None for none."""
    if not (tensors or ints or floats):
        return [None, None]
    pools = iter(tensors), iter(ints), iter(floats)
    return [
        tuple([next(pools[_POOL.get(leaf, 0)]) for leaf in rule.leaves()]) or None if rule else None
        for rule in decode(code)
    ]
