"""The derivative of a score by its argument s, from the symbols that the score was made of.

    d(a b) = da b + a db,   d tanh(a) = (1 - tanh(a)^2) da,   ...,   d where(c, a, b) = where(c, da, db)

Comparisons, integers, positions and tables have none. At a corner the derivative is that of the side that is
taken: of `absolute` at 0 it is 1, of `minimum` and `maximum` where both are equal that of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .elementwise import log, where
from .symbol import FLOAT, Symbol, call, reachable

PER_PAIR = frozenset(("s", "q", "k"))


class Product(NamedTuple):
    """number * factors / divisors, kept apart so that what is multiplied and divided by cancels."""

    number: float = 1.0
    factors: tuple[Symbol, ...] = ()
    divisors: tuple[Symbol, ...] = ()

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 whatever its factors are."""
        return self.number == 0.0

    def times(self, *values: Any) -> Product:
        """The product with symbols and numbers."""
        number, factors, divisors = self.number, list(self.factors), list(self.divisors)
        for value in values:
            if not isinstance(value, Symbol):
                number *= value
            elif (same := _place(value, divisors)) is not None:
                del divisors[same]
            else:
                factors.append(value)
        return Product(number, tuple(factors), tuple(divisors)) if number else ZERO

    def over(self, value: Any) -> Product:
        """The product divided by a symbol or a number."""
        if not isinstance(value, Symbol):
            return self.times(1.0 / value)
        same = _place(value, self.factors)
        if same is None:
            return self._replace(divisors=(*self.divisors, value))
        return self._replace(factors=self.factors[:same] + self.factors[same + 1 :])


ZERO = Product(0.0)


def derivative(score: Any) -> Any:
    """d score / ds, a symbol or a float; score: a float made of the symbol s."""
    if not isinstance(score, Symbol):
        return 0.0
    order, _ = reachable((score,))
    known = _Known()
    for node in order:
        known.add(node)
    return known.value(known.of(score))


class _Known:
    """found: derivatives of symbols, by their ids. fixed: ids of symbols that are the same for every pair."""

    def __init__(self) -> None:
        self.found: dict[int, Product] = {}
        self.fixed: set[int] = set()

    def add(self, node: Symbol) -> None:
        """Find the derivative of a symbol; its arguments have theirs."""
        made_of = [arg for arg in node.args if isinstance(arg, Symbol)]
        if node.op not in PER_PAIR and all(id(arg) in self.fixed for arg in made_of):
            self.fixed.add(id(node))
        if node.op == "s":
            self.found[id(node)] = Product()
        elif node.kind == FLOAT and any(id(arg) in self.found for arg in made_of):
            found = _RULES[node.op](self, node, *node.args)
            if not found.is_zero:
                self.found[id(node)] = found

    def of(self, value: Any) -> Product:
        """The derivative of a symbol or number."""
        return self.found.get(id(value), ZERO)

    def value(self, product: Product) -> Any:
        """A product as a symbol or number; what is the same for every pair comes first."""
        factors = sorted(product.factors, key=lambda factor: id(factor) not in self.fixed)
        result, among = product.number, [id(factor) in self.fixed for factor in factors].count(True)
        for factor in factors[:among]:
            result = _times(result, factor)
        for divisor in product.divisors:
            result = result / divisor
        for factor in factors[among:]:
            result = _times(result, factor)
        return result

    def sum(self, a: Product, b: Product) -> Product:
        """The sum of two derivatives."""
        if a.is_zero or b.is_zero:
            return a if b.is_zero else b
        return Product().times(self.value(a) + self.value(b))


def _times(a: Any, b: Any) -> Any:
    return b if type(a) is float and a == 1.0 else a * b


def _place(value: Symbol, among: Sequence[Symbol]) -> int | None:
    """Where a symbol is, itself, among others."""
    return next((n for n, other in enumerate(among) if other is value), None)


def _plus(known: _Known, _, a, b):
    return known.sum(known.of(a), known.of(b))


def _minus(known: _Known, _, a, b):
    return known.sum(known.of(a), known.of(b).times(-1.0))


def _product(known: _Known, _, a, b):
    if a is b:
        return known.of(a).times(2.0, a)
    return known.sum(known.of(a).times(b), known.of(b).times(a))


def _quotient(known: _Known, y, a, b):
    return known.sum(known.of(a).over(b), known.of(b).times(-1.0, y).over(b))


def _remainder(known: _Known, _, a, b):
    """a - (a // b) b, where a // b has no derivative."""
    if known.of(b).is_zero:
        return known.of(a)
    return known.sum(known.of(a), known.of(b).times(-1.0, a // b))


def _power(known: _Known, y, a, b):
    """b a^(b - 1) da + log(a) a^b db; the first is 0 where b is, the second where a is, as in torch."""
    by_base, by_exponent = known.of(a), known.of(b)
    if not by_base.is_zero:
        slope = call("power", FLOAT, a, b - 1.0)
        factors = (where(b == 0, 0.0, b * slope),) if isinstance(b, Symbol) else (b, slope)
        by_base = by_base.times(*factors)
    if not by_exponent.is_zero:
        slope = where(a == 0, 0.0, y * log(a)) if isinstance(a, Symbol) or a == 0 else y * log(a)
        by_exponent = by_exponent.times(slope)
    return known.sum(by_base, by_exponent)


def _where(known: _Known, _, condition, a, b):
    a, b = known.value(known.of(a)), known.value(known.of(b))
    is_one = a is b or type(a) is type(b) is float and a == b
    return Product().times(a if is_one else where(condition, a, b))


_RULES: dict[str, Callable[..., Product]] = {
    "+": _plus,
    "-": _minus,
    "*": _product,
    "/": _quotient,
    "%": _remainder,
    "//": lambda known, y, a, b: ZERO,
    "neg": lambda known, y, a: known.of(a).times(-1.0),
    "absolute": lambda known, y, a: known.of(a).times(where(a < 0, -1.0, 1.0)),
    "exp": lambda known, y, a: known.of(a).times(y),
    "tanh": lambda known, y, a: known.of(a).times(1.0 - y * y),
    "log": lambda known, y, a: known.of(a).over(a),
    "power": _power,
    "where": _where,
    "minimum": lambda known, y, a, b: _where(known, y, a < b, a, b),
    "maximum": lambda known, y, a, b: _where(known, y, a > b, a, b),
}
