"""Which keys a mask can show, and which it shows for certain, read off what it computes; queries likewise.

A mask that gives no `keys` and `full` of its own gets them here, from the comparisons that it joins by `&`,
`|` and `~`: where the two sides' difference is k or -k plus something that k is not in, the comparison bounds
k; where k is not in it at all, it shows every key or none. What is not understood bounds nothing, which is
right, only slower. Which queries see a range of keys is the same question with q in k's place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .elementwise import maximum, minimum, where
from .expression import LARGEST_POSITION
from .symbol import INT, Symbol, kind_of, reachable

MOST_OPERATIONS = 200  # of a mask that is looked at
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_OTHER = {"k": "q", "q": "k"}


class Span(NamedTuple):
    """Positions low <= x < high; None where that end is open. whole: it is all of them or none."""

    low: Any = None
    high: Any = None
    whole: bool = False

    def ends(self, lowest: Any, beyond: Any) -> tuple[Any, Any]:
        """Both ends; `lowest` and `beyond` for those that are open."""
        return lowest if self.low is None else self.low, beyond if self.high is None else self.high


class Shown(NamedTuple):
    """Of a range of queries: keys that any of them may see, and keys that all of them do; or the reverse."""

    possible: Span
    certain: Span


ALL, NONE = Span(whole=True), Span(0, 0, whole=True)
UNKNOWN = Shown(ALL, NONE)


def shown(visible: Any, of: str, first: Symbol, last: Symbol) -> Shown:
    """What a mask shows. visible: a truth value made of the symbols q and k.

    of: "k", keys that the queries first..last see; "q", queries that see the keys first..last.
    """
    if not isinstance(visible, Symbol):
        return Shown(ALL, ALL) if visible else Shown(NONE, NONE)
    order, _ = reachable((visible,))
    if len(order) > MOST_OPERATIONS:
        return UNKNOWN
    return _Reader(order, of, first, last).shown(visible, negated=False)


class _Reader:
    """of: the symbol that is bounded. first..last: what the other one is between.

    behind: which of the symbols q and k are behind a symbol, by its id.
    """

    def __init__(self, order: list[Symbol], of: str, first: Symbol, last: Symbol) -> None:
        self.of, self.other, self.first, self.last = of, _OTHER[of], first, last
        self.behind: dict[int, set[str]] = {}
        for node in order:
            inside = [self.behind[id(arg)] for arg in node.args if isinstance(arg, Symbol)]
            self.behind[id(node)] = {node.op} & {"q", "k"} if not node.args else set().union(*inside)

    def needs(self, value: Any, name: str) -> bool:
        return isinstance(value, Symbol) and name in self.behind[id(value)]

    def shown(self, value: Any, negated: bool) -> Shown:
        """What a truth value, or its opposite, shows."""
        if not isinstance(value, Symbol):
            return Shown(ALL, ALL) if value != negated else Shown(NONE, NONE)
        if value.op == "~":
            return self.shown(value.args[0], not negated)
        if value.op in ("&", "|") and kind_of(value) != INT:
            a, b = (self.shown(arg, negated) for arg in value.args)
            return _both(a, b) if (value.op == "&") != negated else _either(a, b)
        if value.op in _FLIPPED and all(kind_of(arg) == INT for arg in value.args):
            return self.compared(_NEGATED[value.op] if negated else value.op, *value.args)
        return UNKNOWN

    def compared(self, op: str, a: Any, b: Any) -> Shown:
        """What `a op b` shows, if it is `k op rest` in other words, or k is not in it."""
        sides = self.linear(a), self.linear(b)
        if None in sides:
            return UNKNOWN
        (n_of_a, rest_of_a), (n_of_b, rest_of_b) = sides
        low, high = self.extent(self.known("-", rest_of_b, rest_of_a))
        if n_of_a - n_of_b == 0:
            return _all_or_none(_FLIPPED[op], low, high)
        if n_of_a - n_of_b == 1:
            return _bounded(op, low, high)
        if n_of_a - n_of_b == -1:
            low, high = self.extent(self.known("-", rest_of_a, rest_of_b))
            return _bounded(_FLIPPED[op], low, high)
        return UNKNOWN

    def known(self, op: str, a: Any, b: Any) -> Any:
        """a op b, noting what is behind it."""
        result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b}[op]()
        if isinstance(result, Symbol) and id(result) not in self.behind:
            self.behind[id(result)] = {name for name in "qk" if self.needs(a, name) or self.needs(b, name)}
        return result

    def linear(self, value: Any) -> tuple[int, Any] | None:
        """(n, rest) where the value is n * k + rest and k is not in rest; None where it is not so."""
        if not self.needs(value, self.of):
            return 0, value
        if value.op == self.of:
            return 1, 0
        if value.op in ("+", "-"):
            a, b = map(self.linear, value.args)
            if a is None or b is None:
                return None
            return (a[0] + b[0] if value.op == "+" else a[0] - b[0]), self.known(value.op, a[1], b[1])
        if value.op == "neg" and (inside := self.linear(value.args[0])):
            return -inside[0], self.known("-", 0, inside[1])
        return None

    def extent(self, value: Any) -> tuple[Any, Any]:
        """The least and the greatest that an integer without k is for these queries; None: not known."""
        if not self.needs(value, self.other):
            return value, value
        if value.op == self.other:
            return self.first, self.last
        if value.op not in ("+", "-", "neg", "minimum", "maximum", "//", "*"):
            return None, None
        (a, b), *others = map(self.extent, value.args)
        c, d = others[0] if others else (0, 0)
        if any(end is None for end in (a, b, c, d)):
            return None, None
        if value.op in ("//", "*"):
            by = value.args[1]
            if type(by) is not int or by < 1:
                return None, None
            return (a // by, b // by) if value.op == "//" else (a * by, b * by)
        pick = {"minimum": minimum, "maximum": maximum}.get(value.op)
        if pick:
            return pick(a, c), pick(b, d)
        return (a + c, b + d) if value.op == "+" else (a - d, b - c) if value.op == "-" else (-b, -a)


def _bounded(op: str, low: Any, high: Any) -> Shown:
    """What `k op t` shows for t between low and high."""
    if low is None:
        return UNKNOWN
    if op in ("<", "<="):
        more = int(op == "<=")
        return Shown(Span(high=high + more), Span(high=low + more))
    if op in (">", ">="):
        more = int(op == ">")
        return Shown(Span(low=low + more), Span(low=high + more))
    return Shown(Span(low, high + 1), NONE) if op == "==" else UNKNOWN


def _all_or_none(op: str, low: Any, high: Any) -> Shown:
    """What `t op 0` shows, which k is not in, for t between low and high."""
    if low is None:
        return UNKNOWN
    sometimes, always = {
        "<": (low < 0, high < 0), "<=": (low <= 0, high <= 0),
        ">": (high > 0, low > 0), ">=": (high >= 0, low >= 0),
        "==": ((low <= 0) & (high >= 0), (low == 0) & (high == 0)),
        "!=": ((low != 0) | (high != 0), (low > 0) | (high < 0)),
    }[op]
    return Shown(_all_where(sometimes), _all_where(always))


def _all_where(condition: Any) -> Span:
    """All positions where a condition holds, else none."""
    low = where(condition, -LARGEST_POSITION, LARGEST_POSITION)
    return Span(low, -low, whole=True)


def _both(a: Shown, b: Shown) -> Shown:
    return Shown(_within(a.possible, b.possible), _within(a.certain, b.certain))


def _either(a: Shown, b: Shown) -> Shown:
    """Of two ranges of certain keys that need not make one, the first."""
    possible = _around(a.possible, b.possible)
    if a.certain is NONE or b.certain is NONE:
        return Shown(possible, b.certain if a.certain is NONE else a.certain)
    make_one = _make_one(a.certain, b.certain)
    return Shown(possible, _around(a.certain, b.certain) if make_one else a.certain)


def _make_one(a: Span, b: Span) -> bool:
    """Whether two spans are one in any case: one is all or none, or both are open at the same end."""
    both_low, both_high = a.low is None and b.low is None, a.high is None and b.high is None
    return a.whole or b.whole or both_low or both_high


def _around(a: Span, b: Span) -> Span:
    """The least span with the positions of both."""
    low = None if a.low is None or b.low is None else minimum(a.low, b.low)
    high = None if a.high is None or b.high is None else maximum(a.high, b.high)
    return Span(low, high, a.whole and b.whole)


def _within(a: Span, b: Span) -> Span:
    """The positions of both; NONE where one is NONE."""
    if a is NONE or b is NONE:
        return NONE
    low = b.low if a.low is None else a.low if b.low is None else maximum(a.low, b.low)
    high = b.high if a.high is None else a.high if b.high is None else minimum(a.high, b.high)
    return Span(low, high, a.whole and b.whole)
