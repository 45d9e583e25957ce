"""Masks: which keys a query sees, and which blocks of keys a row block must visit.

    q        the query's position on the key axis: its row + seqlen_k - seqlen_q (bottom-right aligned)
    k        the key's position in its sequence, 0 <= k < seqlen_k
    visible  the rule itself; only comparisons, arithmetic, `&`, `|`, `~` and `elementwise` functions
    keys     a range outside which no query of q_first..q_last sees any key: blocks beyond are skipped
    full     a range inside which every query of q_first..q_last sees every key: no mask is evaluated

`keys` and `full` are half-open, may exceed [0, seqlen_k), and default in kernels to what `bounds` reads off
`visible`, elsewhere to "anything" and "nothing": a rule without them is right, only slower. A brute-force
test holds them to `visible`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .. import bounds
from ..elementwise import load, maximum, minimum
from ..expression import LARGEST_POSITION
from ..rule import Rule, truth
from ..symbol import INT, Symbol, kind_of, leaf, operand


class Mask(Rule):
    """Base of masks: a frozen dataclass with `visible(q, k)`."""

    def visible(self, q, k):
        """True where query `q` attends to key `k`."""
        raise NotImplementedError(f"{type(self).__name__} defines no visible(q, k)")

    def keys(self, q_first, q_last, seqlen_k) -> tuple[Any, Any]:
        """(low, high): no query in q_first..q_last sees a key outside low <= k < high."""
        shown = self._shown(q_first, q_last)
        return shown.possible.ends(0, seqlen_k) if shown else (0, seqlen_k)

    def full(self, q_first, q_last, seqlen_k) -> tuple[Any, Any]:
        """(low, high): every query in q_first..q_last sees every key with low <= k < high."""
        shown = self._shown(q_first, q_last)
        return shown.certain.ends(0, seqlen_k) if shown else (0, 0)

    def _shown(self, q_first, q_last) -> bounds.Shown | None:
        """What `visible` says of the queries q_first..q_last, where that is being traced."""
        if not isinstance(q_first, Symbol):
            return None
        return bounds.shown(self.visible(leaf("q"), leaf("k")), "k", q_first, q_last)

    def sections(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        visible = {"visible": (truth("visible", self.visible(leaf("q"), leaf("k"))),)}
        return visible if self._is_read_off() else visible | self._ranges(values)

    def implied(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        return self._ranges(values) if self._is_read_off() else {}

    def _is_read_off(self) -> bool:
        """Whether both ranges are read off `visible`: then they follow from it."""
        return type(self).keys is Mask.keys and type(self).full is Mask.full

    def _ranges(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        rows = leaf("q_first"), leaf("q_last"), values["seqlen_k"]
        return {"keys": _bounds("keys", self.keys(*rows)), "full": _bounds("full", self.full(*rows))}

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


def _bounds(method: str, found: Any) -> tuple:
    """The two ends of a range of keys that a mask gives."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"{method} returns {found!r}; allowed: (low, high)")
    for bound in found:
        if kind_of(operand(bound)) != INT:
            raise TypeError(f"{method} returns {bound!r} as a bound; allowed: an integer")
    return found


def _within(bound: Any) -> Any:
    """A bound that hides and shows the same pairs, close enough to every position for 32 bits."""
    is_number = isinstance(bound, (int, Integral)) and not isinstance(bound, bool)
    return max(-LARGEST_POSITION, min(bound, LARGEST_POSITION)) if is_number else bound


@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key."""

    def visible(self, q, k):
        return k >= 0

    def full(self, q_first, q_last, seqlen_k):
        return 0, seqlen_k


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees its own position and what came before."""

    def visible(self, q, k):
        return k <= q

    def keys(self, q_first, q_last, seqlen_k):
        return 0, q_last + 1

    def full(self, q_first, q_last, seqlen_k):
        return 0, q_first + 1


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query sees `left` keys before and `right` keys after its position, both inclusive.

    None is unbounded; `SlidingWindow(None, 0)` is causal.
    """

    left: int | None = None
    right: int | None = None

    def form(self) -> SlidingWindow:
        left, right = _within(self.left), _within(self.right)
        return self if (left, right) == (self.left, self.right) else SlidingWindow(left, right)

    def visible(self, q, k):
        if self.left is None:
            return k >= 0 if self.right is None else k <= q + self.right
        if self.right is None:
            return k >= q - self.left
        return (k >= q - self.left) & (k <= q + self.right)

    def keys(self, q_first, q_last, seqlen_k):
        low = 0 if self.left is None else q_first - self.left
        high = seqlen_k if self.right is None else q_last + self.right + 1
        return low, high

    def full(self, q_first, q_last, seqlen_k):
        low = 0 if self.left is None else q_last - self.left
        high = seqlen_k if self.right is None else q_first + self.right + 1
        return low, high


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, except that the first `prefix` keys are seen by every query.

    prefix: int, or an int32 tensor (batch,).
    """

    prefix: Any
    tables = {"prefix": (("batch",),)}

    def form(self) -> PrefixLM:
        if hasattr(self.prefix, "shape") and self.prefix.shape or _within(self.prefix) == self.prefix:
            return self
        return PrefixLM(_within(self.prefix))

    def at(self, batch, head, seqlen_q, seqlen_k):
        return PrefixLM(load(self.prefix, batch)) if hasattr(self.prefix, "shape") else self

    def visible(self, q, k):
        return (k <= q) | (k < self.prefix)

    def keys(self, q_first, q_last, seqlen_k):
        return 0, maximum(q_last + 1, self.prefix)

    def full(self, q_first, q_last, seqlen_k):
        return 0, maximum(q_first + 1, self.prefix)


@dataclass(frozen=True)
class Document(Mask):
    """A query sees the keys of its own document.

    ids: int32 tensor (batch, seqlen_k): the document of each position; query row i stands at position
    i + seqlen_k - seqlen_q. Combine with `Causal()` by `&`.
    """

    ids: Any
    tables = {"ids": (("batch", "seqlen_k"),)}

    def at(self, batch, head, seqlen_q, seqlen_k):
        return _DocumentOf(self.ids, batch)


@dataclass(frozen=True)
class _DocumentOf(Mask):
    ids: Any
    batch: Any

    def visible(self, q, k):
        return load(self.ids, self.batch, q) == load(self.ids, self.batch, k)


@dataclass(frozen=True)
class Both(Mask):
    """What both masks show; `a & b`."""

    first: Mask
    second: Mask

    def at(self, batch, head, seqlen_q, seqlen_k):
        where = (batch, head, seqlen_q, seqlen_k)
        return Both(self.first.at(*where), self.second.at(*where))

    def visible(self, q, k):
        return self.first.visible(q, k) & self.second.visible(q, k)

    def keys(self, q_first, q_last, seqlen_k):
        (a, b), (c, d) = (m.keys(q_first, q_last, seqlen_k) for m in (self.first, self.second))
        return maximum(a, c), minimum(b, d)

    def full(self, q_first, q_last, seqlen_k):
        (a, b), (c, d) = (m.full(q_first, q_last, seqlen_k) for m in (self.first, self.second))
        return maximum(a, c), minimum(b, d)


@dataclass(frozen=True)
class Either(Mask):
    """What either mask shows; `a | b`."""

    first: Mask
    second: Mask

    def at(self, batch, head, seqlen_q, seqlen_k):
        where = (batch, head, seqlen_q, seqlen_k)
        return Either(self.first.at(*where), self.second.at(*where))

    def visible(self, q, k):
        return self.first.visible(q, k) | self.second.visible(q, k)

    def keys(self, q_first, q_last, seqlen_k):
        (a, b), (c, d) = (m.keys(q_first, q_last, seqlen_k) for m in (self.first, self.second))
        return minimum(a, c), maximum(b, d)

    def full(self, q_first, q_last, seqlen_k):
        return self.first.full(q_first, q_last, seqlen_k)
