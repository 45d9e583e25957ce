"""Which keys a mask can show, and which it shows for certain, read off what it computes.

A mask that gives no `keys` and `full` of its own gets them here, from the comparisons that it joins by `&`,
`|` and `~`: where the two sides' difference is k or -k plus something that k is not in, the comparison bounds
k. What is not understood bounds nothing, which is right, only slower.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .elementwise import maximum, minimum
from .symbol import INT, Symbol, kind_of, reachable

MOST_OPERATIONS = 200  # of a mask that is looked at
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


class Keys(NamedTuple):
    """Keys low <= k < high; None where that end is open."""

    low: Any = None
    high: Any = None

    def ends(self, seqlen_k: Any) -> tuple[Any, Any]:
        """Both ends."""
        return 0 if self.low is None else self.low, seqlen_k if self.high is None else self.high


class Shown(NamedTuple):
    """Of the queries q_first..q_last: keys that any of them may see, and keys that all of them do."""

    possible: Keys
    certain: Keys


ALL, NONE = Keys(), Keys(0, 0)
UNKNOWN = Shown(ALL, NONE)


def shown(visible: Any, q_first: Symbol, q_last: Symbol) -> Shown:
    """What a mask shows. visible: a truth value made of the symbols q and k."""
    if not isinstance(visible, Symbol):
        return Shown(ALL, ALL) if visible else Shown(NONE, NONE)
    order, _ = reachable((visible,))
    if len(order) > MOST_OPERATIONS:
        return UNKNOWN
    return _Reader(order, q_first, q_last).shown(visible, negated=False)


class _Reader:
    """q_first..q_last: the queries. behind: which of the symbols q and k are behind a symbol, by its id."""

    def __init__(self, order: list[Symbol], q_first: Symbol, q_last: Symbol) -> None:
        self.q_first, self.q_last = q_first, q_last
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
        """What `a op b` shows, if it is `k op rest` in other words."""
        sides = self.linear(a), self.linear(b)
        if None in sides:
            return UNKNOWN
        (k_of_a, rest_of_a), (k_of_b, rest_of_b) = sides
        if k_of_a - k_of_b == 1:
            low, high = self.extent(self.known("-", rest_of_b, rest_of_a))
        elif k_of_a - k_of_b == -1:
            op, (low, high) = _FLIPPED[op], self.extent(self.known("-", rest_of_a, rest_of_b))
        else:
            return UNKNOWN
        return _bounded(op, low, high)

    def known(self, op: str, a: Any, b: Any) -> Any:
        """a op b, noting what is behind it."""
        result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b}[op]()
        if isinstance(result, Symbol) and id(result) not in self.behind:
            self.behind[id(result)] = {name for name in "qk" if self.needs(a, name) or self.needs(b, name)}
        return result

    def linear(self, value: Any) -> tuple[int, Any] | None:
        """(n, rest) where the value is n * k + rest and k is not in rest; None where it is not so."""
        if not self.needs(value, "k"):
            return 0, value
        if value.op == "k":
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
        if not self.needs(value, "q"):
            return value, value
        if value.op == "q":
            return self.q_first, self.q_last
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
        return Shown(Keys(high=high + more), Keys(high=low + more))
    if op in (">", ">="):
        more = int(op == ">")
        return Shown(Keys(low=low + more), Keys(low=high + more))
    return Shown(Keys(low, high + 1), NONE) if op == "==" else UNKNOWN


def _both(a: Shown, b: Shown) -> Shown:
    return Shown(_within(a.possible, b.possible), _within(a.certain, b.certain))


def _either(a: Shown, b: Shown) -> Shown:
    """The certain keys of one of them: two ranges need not make one."""
    (low, high), (low_b, high_b) = a.possible, b.possible
    low = None if low is None or low_b is None else minimum(low, low_b)
    high = None if high is None or high_b is None else maximum(high, high_b)
    return Shown(Keys(low, high), b.certain if a.certain is NONE else a.certain)


def _within(a: Keys, b: Keys) -> Keys:
    """The keys of both; NONE where one is NONE."""
    if a is NONE or b is NONE:
        return NONE
    low = b.low if a.low is None else a.low if b.low is None else maximum(a.low, b.low)
    high = b.high if a.high is None else a.high if b.high is None else minimum(a.high, b.high)
    return Keys(low, high)
