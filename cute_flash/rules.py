"""From what a user says about pairs of query and key to one mask and one score inside an operator.

    mask_of, score_of   arguments of the interface -> the rules that apply together
    encode              rules -> a string and lists of numbers and tensors: what an operator can take
    decode, values      the same, inside the operator

The string names the rules' types: "Both(Causal(),SlidingWindow(int,none))|Softcap(float)".
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .arch.common.mask import Both, Causal, Mask, SlidingWindow
from .arch.common.score import ALiBi, Chain, Score, Softcap
from .arch.rule import Rule, RuleType, describe, outside_values

_SHORT = reprlib.Repr()
_SHORT.maxother = 60


class Encoded(NamedTuple):
    """Rules as an operator takes them: types as text, run-time values by kind, the mask's first."""

    code: str
    tensors: list[torch.Tensor]
    ints: list[int]
    floats: list[float]


def mask_of(causal: bool, window: tuple[int | None, int | None], mask: Any) -> list[Rule | str]:
    """Masks that must all show a pair. window: (left, right), None for unbounded; causal is right = 0."""
    left, right = window
    if causal:
        right = 0
    parts: list[Rule | str] = []
    if left is None and right == 0:
        parts.append(Causal())
    elif left is not None or right is not None:
        parts.append(SlidingWindow(left, right))
    if mask is not None:
        parts.append(part_of(mask, Mask, "mask"))
    return parts


def score_of(softcap: float, alibi_slopes: torch.Tensor | None, score: Any) -> list[Rule | str]:
    """Softcap, then ALiBi, then the user's rule, to be applied in this order."""
    parts: list[Rule | str] = []
    if softcap:
        parts.append(Softcap(softcap))
    if alibi_slopes is not None:
        parts.append(ALiBi(alibi_slopes))
    if score is not None:
        parts.append(part_of(score, Score, "score"))
    return parts


def part_of(value: Any, base: type[Rule], argument: str) -> Rule | str:
    """`value` if it is a rule; if it is a plain function, the id of the rule that it makes."""
    if isinstance(value, base):
        return value
    method = "visible(q, k)" if base is Mask else "score(s, batch, head, q, k)"
    if not isinstance(value, types.FunctionType):
        given = f"{_SHORT.repr(value)} ({type(value).__name__})"
        raise TypeError(
            f"{argument} is {given}; allowed: a {base.__name__} object, or a plain function {method}"
        )
    return _id_of_function(value, base, argument, torch.compiler.is_compiling())


def encode(masks: list[Rule | str], scores: list[Rule | str]) -> Encoded:
    """Rules as an operator's arguments. Raises TypeError where a rule's field cannot travel."""
    pools: tuple[list, list, list] = ([], [], [])
    mask, score = [_encode(part, pools) for part in masks], [_encode(part, pools) for part in scores]
    mask_code = f"{Both.rule_id}({','.join(mask)})" if len(mask) > 1 else "".join(mask)
    score_code = f"{Chain.rule_id}([{','.join(score)}])" if len(score) > 1 else "".join(score)
    return Encoded(f"{mask_code}|{score_code}", *pools)


def _encode(part: Rule | str, pools: tuple[list, list, list]) -> str:
    """The text of a rule's type; its values are appended to the pools of tensors, ints and floats."""
    if isinstance(part, str):
        return f"{part}()"
    if getattr(type(part), "__match_args__", None) == ():
        return f"{part.rule_id}()"
    kind, found = describe(part)
    for leaf, value in zip(kind.leaves(), found, strict=True):
        pools[{"int": 1, "float": 2}.get(leaf, 0)].append(value)
    return _code(kind)


@functools.lru_cache(maxsize=4096)
def decode(code: str) -> tuple[RuleType | None, RuleType | None]:
    """The types of mask and score that `encode` wrote."""
    mask, _, score = code.partition("|")
    return _parse_rule(mask), _parse_rule(score)


def values(code: str, tensors: Sequence, ints: Sequence, floats: Sequence) -> list[tuple | None]:
    """The run-time values of the mask and of the score, in the order of their leaves; None for none."""
    if not (tensors or ints or floats):
        return [None, None]
    pools = {"int": iter(ints), "float": iter(floats)}
    rest = iter(tensors)
    return [
        tuple([next(pools.get(leaf, rest)) for leaf in kind.leaves()]) or None if kind else None
        for kind in decode(code)
    ]


# code of a function -> (what it used from outside, the id of the rule made of it). A function that is made
# anew at every call has the same code; the rule is made anew where a value from outside has changed.
_WRAPPED: dict[tuple[types.CodeType, type[Rule]], tuple[tuple, str]] = {}


def _id_of_function(function: types.FunctionType, base: type[Rule], argument: str, traced: bool) -> str:
    """The id of the rule made of a plain function. torch.compile runs this once and keeps the result."""
    outside = (function.__defaults__, *outside_values(function))
    if traced and any(isinstance(value, (int, float, str, tuple)) for value in outside):
        raise TypeError(
            f"{argument} is {function.__qualname__}, which uses values from outside; within torch.compile it "
            f"would not see them change: make it a {base.__name__} with such values as fields"
        )
    known = _WRAPPED.get((function.__code__, base))
    if known and len(known[0]) == len(outside) and all(map(_same, known[0], outside)):
        return known[1]
    wanted = ("q", "k") if base is Mask else ("s", "batch", "head", "q", "k")
    signature = inspect.signature(function)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if [p.kind in positional for p in signature.parameters.values()] != [True] * len(wanted):
        name = f"{function.__qualname__}{signature}"
        raise TypeError(f"{argument} is {name}; allowed: a function of ({', '.join(wanted)})")
    method = _method(function, base)
    name = re.sub(r"\W", "_", function.__name__)
    members = {method.__name__: method, "__qualname__": name, "__module__": function.__module__}
    rule = dataclass(frozen=True)(types.new_class(name, (base,), exec_body=lambda body: body.update(members)))
    _WRAPPED[function.__code__, base] = (outside, rule.rule_id)
    return rule.rule_id


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo here.
_id_of_function._dynamo_marked_constant = True


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, tuple)) and a == b)


def _method(function: Callable, base: type[Rule]) -> types.FunctionType:
    if base is Mask:

        def visible(self, q, k):
            return function(q, k)

        return visible

    def score(self, s, batch, head, q, k):
        return function(s, batch, head, q, k)

    return score


def _code(kind: Any) -> str:
    if isinstance(kind, RuleType):
        return f"{kind.rule_id}({','.join([_code(k) for k in kind.kinds])})"
    if isinstance(kind, tuple):
        return f"[{','.join([_code(k) for k in kind])}]"
    return kind


def _parse_rule(text: str) -> RuleType | None:
    if not text:
        return None
    kind, rest = _parse_kind(text)
    if rest or not isinstance(kind, RuleType):
        raise ValueError(f"{text!r} names no rule")
    return kind


def _parse_kind(text: str) -> tuple[Any, str]:
    """The kind that `text` begins with, and the rest of the text."""
    if text[0] == "[":
        return _parse_kinds(text[1:], "]")
    name = re.match(r"[^][(),]*", text).group()
    rest = text[len(name):]
    if not rest.startswith("("):
        return name, rest
    kinds, rest = _parse_kinds(rest[1:], ")")
    return RuleType(name, kinds), rest


def _parse_kinds(text: str, end: str) -> tuple[tuple, str]:
    kinds = []
    while not text.startswith(end):
        kind, text = _parse_kind(text.removeprefix(","))
        kinds.append(kind)
    return tuple(kinds), text[1:]
