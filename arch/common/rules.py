"""The rules of a call over a block of scores, and the pairs (query, key) behind them."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from ..elementwise import where
from ..expression import Bound
from ..problem import Operands, Problem
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
        mask, score = (
            rule and rule.at(values or (), *place)
            for rule, values in ((problem.mask, call.mask_values), (problem.score, call.score_values))
        )
        return Rules(
            sequence.batch, head, sequence.offset, sequence.seqlen_k, call.softmax_scale, mask, score
        )

    def change(self, masked: bool) -> bool:
        """Whether `apply` does anything to a block."""
        return masked or self.score is not None

    def apply(self, s: cute.Tensor, row_of, key_of, masked: bool) -> None:
        """S (rows, columns) in place: the score rule, then -inf where hidden or beyond seqlen_k.

        row_of(r), key_of(c): row of the query and index of the key inside the sequence. masked: False
        where every key is seen.
        """
        for c in range(cute.size(s, mode=[1])):
            for r in range(cute.size(s, mode=[0])):
                q, k = row_of(r) + self.offset, key_of(c)
                if self.score is not None:
                    s[r, c] = self.score.score(s[r, c] * self.scale, self.batch, self.head, q, k)
                if masked:
                    s[r, c] = where(self._seen(q, k), s[r, c], -Float32.inf)

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
