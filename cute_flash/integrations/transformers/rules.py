"""The rules that transformers' masks become. Tables are by query row, not by position: see `_row`.

    Runs    a query sees one run of keys; padding inside it hides some
    Shown   a boolean mask, a number per pair
    Bias    an additive mask or a position bias, a number per pair
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arch.elementwise import load, maximum, minimum, to_float
from ...masks import Mask
from ...scores import Score


def _row(q, seqlen_q, seqlen_k):
    """The row of the query at position q, which may lie outside the sequence in a tile's padding."""
    return minimum(maximum(q - (seqlen_k - seqlen_q), 0), seqlen_q - 1)


@dataclass(frozen=True)
class Runs(Mask):
    """A query sees the keys first <= k < end, a run of its own; neither falls from one query to the next.

    bounds: int32 (batch, 2, seqlen_q): first, end.
    """

    bounds: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return _RunsOf(self.bounds, batch, seqlen_q, seqlen_k)


@dataclass(frozen=True)
class _RunsOf(Mask):
    bounds: Any
    batch: Any
    seqlen_q: Any
    seqlen_k: Any

    def _first(self, q):
        return load(self.bounds, self.batch, 0, _row(q, self.seqlen_q, self.seqlen_k))

    def _end(self, q):
        return load(self.bounds, self.batch, 1, _row(q, self.seqlen_q, self.seqlen_k))

    def visible(self, q, k):
        return (k >= self._first(q)) & (k < self._end(q))

    def keys(self, q_first, q_last, seqlen_k):
        return self._first(q_first), self._end(q_last)

    def full(self, q_first, q_last, seqlen_k):
        return self._first(q_last), self._end(q_first)


@dataclass(frozen=True)
class PaddedRuns(Mask):
    """`Runs` in which some keys are padding, which nobody sees.

    bounds: int32 (batch, 3, max(seqlen_q, seqlen_k)): first and end of each query; for each key, the first
    padding from it on, itself if it is padding.
    """

    bounds: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return _PaddedRunsOf(self.bounds, batch, seqlen_q, seqlen_k)


@dataclass(frozen=True)
class _PaddedRunsOf(Mask):
    bounds: Any
    batch: Any
    seqlen_q: Any
    seqlen_k: Any

    def _run(self):
        return _RunsOf(self.bounds, self.batch, self.seqlen_q, self.seqlen_k)

    def _padding(self, k):
        return load(self.bounds, self.batch, 2, minimum(maximum(k, 0), self.seqlen_k - 1))

    def visible(self, q, k):
        return self._run().visible(q, k) & (self._padding(k) > k)

    def keys(self, q_first, q_last, seqlen_k):
        return self._run().keys(q_first, q_last, seqlen_k)

    def full(self, q_first, q_last, seqlen_k):
        first, end = self._run().full(q_first, q_last, seqlen_k)
        return first, minimum(end, self._padding(first))


@dataclass(frozen=True)
class Shown(Mask):
    """A pair is visible where the table is not 0.

    table: uint8 (batch, heads, seqlen_q, seqlen_k); 1 in place of any of the four counts for all.
    """

    table: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return _ShownTo(self.table, batch, head, seqlen_q, seqlen_k)


@dataclass(frozen=True)
class _ShownTo(Mask):
    table: Any
    batch: Any
    head: Any
    seqlen_q: Any
    seqlen_k: Any

    def visible(self, q, k):
        # `load` takes an index beyond a dimension of 1 as its only one.
        return load(self.table, self.batch, self.head, _row(q, self.seqlen_q, self.seqlen_k), k) > 0


@dataclass(frozen=True)
class Bias(Score):
    """A number from a table is added to a scaled score.

    table: floating point (batch, heads, seqlen_q, seqlen_k); 1 in place of any of the four counts for all.
    """

    table: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return _BiasOf(self.table, seqlen_q, seqlen_k)


@dataclass(frozen=True)
class _BiasOf(Score):
    table: Any
    seqlen_q: Any
    seqlen_k: Any

    def score(self, s, batch, head, q, k):
        row = _row(q, self.seqlen_q, self.seqlen_k)
        return s + to_float(load(self.table, batch, head, row, k))
