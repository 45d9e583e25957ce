"""The rules of a call over a block of scores, and the pairs (query, key) behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from ..elementwise import maximum, minimum, where
from ..expression import Bound
from ..problem import Operands, Problem
from ..row_range import with_row_range
from .columns import WORD, Keys, is_set, seen_words
from .sequence import Sequence


class Rules(NamedTuple):
    """Mask and score as they stand for one query head of one sequence; None where the call has none.

    offset: position of query row 0 on the key axis.
    """

    batch: Int32
    head: Int32
    offset: Int32
    seqlen_k: Int32
    scale: Float32
    mask: Bound | None
    score: Bound | None

    @staticmethod
    def of(problem: Problem, call: Operands, sequence: Sequence, head: Int32) -> Rules:
        """The rules of a call for one head."""
        place = (sequence.batch, head, sequence.seqlen_q, sequence.seqlen_k)
        rules = problem.mask and with_row_range(problem.mask), problem.score
        mask, score = (
            rule and rule.at(values or (), *place)
            for rule, values in zip(rules, (call.mask_values, call.score_values), strict=True)
        )
        return Rules(
            sequence.batch, head, sequence.offset, sequence.seqlen_k, call.softmax_scale, mask, score
        )

    def change(self, masked: bool) -> bool:
        """Whether `apply` does anything to a block."""
        return masked or self.score is not None

    def apply(self, s: cute.Tensor, row_of, keys: Keys, masked: bool) -> None:
        """S (rows, columns) in place: the score rule, then -inf where hidden or beyond seqlen_k.

        row_of(r): row of the query inside the sequence. masked: False where every key is seen.
        """
        rows, columns = cute.size(s, mode=[0]), cute.size(s, mode=[1])
        if masked and (self.mask is None or self.mask.has_range):
            for r in range(rows):
                q = row_of(r) + self.offset
                for n, word in enumerate(self._words(q, keys, columns)):
                    for c in range(n * WORD, min(n * WORD + WORD, columns)):
                        self._score(s, (r, c), q, keys)
                        s[r, c] = where(is_set(word, c % WORD), s[r, c], -Float32.inf)
            return
        for c in range(columns):
            for r in range(rows):
                q = row_of(r) + self.offset
                self._score(s, (r, c), q, keys)
                if masked:
                    s[r, c] = where(self._seen(q, keys.of(c)), s[r, c], -Float32.inf)

    def _score(self, s: cute.Tensor, at: tuple[int, int], q: Int32, keys: Keys) -> None:
        """The score rule on one element of S, if there is one."""
        if self.score is not None:
            s[at] = self.score.score(s[at] * self.scale, self.batch, self.head, q, keys.of(at[1]))

    def _words(self, q: Int32, keys: Keys, columns: int) -> Iterator[Uint32]:
        """Which columns query `q` sees, whose mask shows it one range of keys."""
        low, high = (0, self.seqlen_k) if self.mask is None else self.mask.seen(q)
        if not isinstance(low, int):
            low = minimum(maximum(low, 0), self.seqlen_k)
        high = maximum(minimum(high, self.seqlen_k), 0)
        return seen_words(keys, low, high, columns)

    def apply_with_slopes(self, s: cute.Tensor, row_of, key_of, masked: bool) -> cute.Tensor | float:
        """As `apply`; the score rule's derivatives (rows, columns), or a number that all of them are.

        The rule is a `reverse.differentiated` one. A derivative of what is hidden may be any number, or none.
        """
        slopes: cute.Tensor | float = 1.0
        for c in range(cute.size(s, mode=[1])):
            for r in range(cute.size(s, mode=[0])):
                q, k = row_of(r) + self.offset, key_of(c)
                if self.score is not None:
                    scaled = s[r, c] * self.scale
                    s[r, c], slope = self.score.derivative(scaled, self.batch, self.head, q, k)
                    slopes = _noted(slopes, slope, s, (r, c))
                if masked:
                    s[r, c] = where(self._seen(q, k), s[r, c], -Float32.inf)
        return slopes

    def _seen(self, q: Int32, k: Int32):
        inside = k < self.seqlen_k
        return inside if self.mask is None else inside & self.mask.visible(q, k)


def _noted(slopes: cute.Tensor | float, slope: Float32 | float, s: cute.Tensor, at: tuple[int, int]):
    """`slopes` with one more: the number itself where it is known beforehand, as then all are."""
    if isinstance(slope, float):
        return slope
    if isinstance(slopes, float):
        shape = cute.size(s, mode=[0]), cute.size(s, mode=[1])
        slopes = cute.make_rmem_tensor(shape, Float32)
    slopes[at] = slope
    return slopes
