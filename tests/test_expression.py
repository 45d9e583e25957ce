"""One meaning of every operator: in Python, on torch tensors, on plain integers and on the device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cute_flash.arch.elementwise import absolute, exp, load, maximum, minimum, tanh, to_float, where
from cute_flash.arch.expression import expression
from cute_flash.arch.rule import Rule, describe, traced
from cute_flash.arch.symbol import INT, Symbol
from cute_flash.dispatch import EMULATED, emulated
from cute_flash.executable import executable
from tests.expression_kernel import EXPRESSIONS, ExpressionConfig, ExpressionProblem, Operands

INTEGERS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
    "ne": operator.ne, "neg": lambda a, b: -a, "invert": lambda a, b: ~a,
    "absolute": lambda a, b: absolute(a),
    "square": lambda a, b: a**2, "cube": lambda a, b: (a % 1000) ** 3, "to_the_0": lambda a, b: a**0 + b,
    "minimum": minimum, "maximum": maximum, "where": lambda a, b: where(a < b, a * 2, b - 1),
    "not": lambda a, b: ~(a < b), "both": lambda a, b: (a < b) & (b < 7),
    "either": lambda a, b: (a < b) | (b > 7), "apart": lambda a, b: (a < b) ^ (b > 7),
    "truths_add": lambda a, b: where(a < b, 1, 0) + where(b > 7, 1, 0),
    "shift_left": lambda a, b: a << (b & 15), "shift_right": lambda a, b: a >> (b & 63),
    "shifted_left_by_3": lambda a, b: a << 3, "shifted_right_by_40": lambda a, b: a >> 40,
    "one_shifted": lambda a, b: 1 << (b & 31), "two_to_the": lambda a, b: 2 ** (b & 31),
    **{f"floordiv_{n}": lambda a, b, n=n: a // n for n in (-7, -4, -1, 1, 3, 8, 1000)},
    **{f"mod_{n}": lambda a, b, n=n: a % n for n in (-7, -4, -1, 1, 3, 8, 1000)},
    "mod_of_difference": lambda a, b: (a - b) % 3, "floordiv_of_difference": lambda a, b: (a - b) // 3 * 3,
    "unsigned": lambda a, b: (a & 1023) % 7 + (b & 1023) // 7,
    "unsigned_by_more": lambda a, b: (a & 1023) % 4096,
    "reverse": lambda a, b: 100 - a, "divided": lambda a, b: 100 // b, "remaining": lambda a, b: -100 % b,
    "compared_to_large": lambda a, b: a < 2**40, "large": lambda a, b: a + 2**40,
}
FLOATS: dict[str, Callable] = {
    "truediv": lambda a, b: a / b, "halves": lambda a, b: a * 0.5, "mixed": lambda a, b: 1.5 + a - b * 0.25,
    "float_floordiv": lambda a, b: a * 0.5 // 0.75, "float_mod": lambda a, b: a * 0.5 % 0.75,
    "float_mod_negative": lambda a, b: a * 0.5 % -0.75, "float_mod_int": lambda a, b: a * 0.25 % b,
    "float_square": lambda a, b: to_float(a) ** 2, "inverse": lambda a, b: to_float(2 * a + 1) ** -1,
    "root": lambda a, b: to_float(absolute(a) + 1) ** 0.5, "power": lambda a, b: 2.0 ** (b * 0.125),
    "exp": lambda a, b: exp(a * 0.01), "tanh": lambda a, b: tanh(a * 0.1), "infinite": lambda a, b: -math.inf,
    "float_where": lambda a, b: where(a * 1.0 < b, a, 0.5), "float_absolute": lambda a, b: absolute(a * 1.0),
}
# What a table of int32 or int64 may hold besides small numbers. A divisor of 0 has no meaning.
LARGE = [2**15, 46341, 2**30, 2**31 - 1, -(2**15), -46341, -(2**30), -(2**31)]
LARGER = [2**31, 2**32 + 1, 2**40, -(2**31) - 1, -(2**40), -(2**33) + 5]


@dataclass(frozen=True)
class Computed(Rule):
    """A function of two numbers, each from a table."""

    a: Any
    b: Any
    function: Callable

    def of(self, k):
        return self.function(load(self.a, k), load(self.b, k))

    def sections(self, values):
        return {"score": (self.of(Symbol(INT, "k")),)}


@dataclass(frozen=True)
class Numbers(Rule):
    """The same of two numbers that are its fields."""

    a: int
    b: int
    function: Callable

    def sections(self, values):
        return {"score": (self.function(self.a, self.b),)}


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of small numbers of both signs, and of large ones, that a table of this dtype can hold."""
    held = torch.iinfo(dtype)
    found = [*range(-9, 12), -128, -127, 127, 255, *([*LARGE, *LARGER] if dtype == torch.int64 else LARGE)]
    numbers = torch.tensor([n for n in found if held.min <= n <= held.max])
    a, b = torch.cartesian_prod(numbers, numbers[numbers != 0]).unbind(1)
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


def texts(functions: dict[str, Callable], a: torch.Tensor, b: torch.Tensor) -> tuple[str, ...]:
    return tuple(traced(describe(Computed(a, b, function))[0]) for function in functions.values())


def on_the_device(arch: str, functions: dict[str, Callable], a, b) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers, floats) of all functions, one row each."""
    problem = ExpressionProblem(texts(functions, a, b), tuple(str(x.dtype)[6:] for x in (a, b)))
    run = executable(EXPRESSIONS, problem, ExpressionConfig(), EMULATED[arch], "emulator")
    k, s = torch.arange(len(a), dtype=torch.int32), torch.zeros(len(a))
    integers = torch.zeros(len(functions), len(a), dtype=torch.int64)
    floats = torch.full((len(functions), len(a)), math.nan)
    with emulated(arch):
        run(*Operands(k, k, s, integers, floats, (a, b)))
    return integers, floats


def exact(function: Callable, a: torch.Tensor, b: torch.Tensor) -> list:
    """The function in Python's own integers."""
    return [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def wrapped(numbers: list) -> list[int]:
    """Python's integers in 64 bits."""
    return [(int(n) + 2**63) % 2**64 - 2**63 for n in numbers]


DTYPES = [torch.int8, torch.uint8, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_pythons_on_the_device(dtype, arch):
    """Large results wrap in 64 bits."""
    a, b = pairs(dtype)
    functions = {name: f for name, f in INTEGERS.items() if name != "not"}  # ~True is -2 to Python
    integers, _ = on_the_device(arch, functions, a, b)
    for found, (name, function) in zip(integers.tolist(), functions.items(), strict=True):
        want = wrapped(exact(function, a, b))
        wrong = [(*at, n, w) for *at, n, w in zip(a.tolist(), b.tolist(), found, want, strict=True) if n != w]
        assert not wrong, f"{name}: {wrong[:3]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_torchs_and_the_expressions(name, dtype):
    """What a rule computes on tensors, and its expression on plain integers."""
    a, b = pairs(dtype)
    function = INTEGERS[name]
    on_tensors = Computed(a, b, function).of(torch.arange(len(a))).long().tolist()
    for x, y, on_tensor in zip(a.tolist(), b.tolist(), on_tensors, strict=True):
        want = not x < y if name == "not" else function(x, y)
        kind, values = describe(Numbers(x, y, function))
        on_integers = expression(traced(kind)).at(values, 0, 0, 0, 0).score(0.0, 0, 0, 0, 0)
        assert on_integers == want, f"{name} of {x} and {y}"
        assert on_tensor == wrapped([want])[0], f"{name} of {x} and {y}"


def test_floats_are_pythons_to_rounding(arch):
    a, b = pairs(torch.int8)
    _, floats = on_the_device(arch, FLOATS, a, b)
    on_tensors = {name: Computed(a, b, f).of(torch.arange(len(a))) for name, f in FLOATS.items()}
    for found, (name, function) in zip(floats, FLOATS.items(), strict=True):
        want = torch.tensor(exact(function, a, b), dtype=torch.float64)
        near = torch.isclose(found.double(), want, rtol=1e-5, atol=1e-6)
        assert near.all(), f"{name}: {found[~near][:3]} where {want[~near][:3]} is right"
        if isinstance(on_tensors[name], torch.Tensor):
            torch.testing.assert_close(on_tensors[name].double(), want)


