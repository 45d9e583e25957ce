"""S and dP of a warpgroup element by element: P = exp(S - LSE), dS = P (dP - D), and what rules do to them.

A thread has 2 rows of Q x 2 keys of each octet of an accumulator's columns, whichever way round scores lie.

    Transposed   S^T: keys are the 64 rows of a product, and an octet is 8 rows of Q
    Straight     S: rows of Q are, and an octet is 8 keys
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from ...common.dropout import Dropout
from ...common.element import element_type
from ...common.key_block import KeyBlock
from ...common.order import depend_on_load, pin
from ...common.rules import Rules
from ...common.softmax import LOG2_E, exp2
from ...elementwise import where
from ...problem import Problem
from ..mma import coordinates

SIGNS = 0x8000, 0x80000000  # of a register's two numbers of 16 bits


class Weighing(NamedTuple):
    """How scores become probabilities, of one query head."""

    rules: Rules
    dropout: Dropout | None
    scale_log2: Float32

    @staticmethod
    def of(problem: Problem, block: KeyBlock, rules: Rules) -> Weighing:
        """Of a key block's head."""
        dropout = Dropout.of(problem, block.call, block.sequence, block.head)
        # A score rule takes scaled scores, so that only the change of base is left.
        scale = 1.0 if problem.score else block.call.softmax_scale
        return Weighing(rules, dropout, Float32(scale * LOG2_E))


class Visit(NamedTuple):
    """What a thread works on now. All of it is found anew at every visit: see `hidden_zero`.

    first_row, first_key: of the tile's rows, and of the warpgroup's keys. turn: visits before this one.
    operands: of the warpgroup's products.
    """

    warpgroup: Int32
    thread: Int32  # of the warpgroup
    turn: Int32
    first_row: Int32
    first_key: Int32
    operands: Any
    weighing: Weighing


class Elements:
    """What is the same whichever way round scores lie.

    mma: their product, of `columns` columns. weights_are_p: dS is a multiple of P itself, which becomes an
    operand when dS does. sparing: nothing of the next octet is worked out before it is its turn.
    """

    def __init__(
        self, problem: Problem, mma: cute.TiledMma, columns: int, weights_are_p: bool, sparing: bool
    ):
        self.problem, self.mma, self.columns = problem, mma, columns
        self.weights_are_p, self.sparing = weights_are_p, sparing
        self.dtype = element_type(problem.precision)

    def probabilities(
        self, visit: Visit, s: cute.Tensor, p_operand: cute.Tensor, lse: cute.Tensor, masked: bool
    ) -> None:
        """S becomes, in place, what dP - D is multiplied by: P, times the slope of the score rule.

        Then P itself is kept as an operand. A slope that is no number, of a pair that is hidden or has no
        weight, counts for nothing. Each octet is brought to its end before the next, so that what lies
        between takes few registers.
        """
        at, weighing = coordinates(self.mma, self.columns, visit.thread), visit.weighing
        first_row = visit.first_row
        for i, exponents in self.by_octet(visit, lse):
            p = self.octet(s, i)
            slopes = weighing.rules.apply_with_slopes(
                p,
                lambda r, first=first_row, i=i: first + self.row(at, i, r),
                lambda c, i=i: visit.first_key + self.key(at, i, c),
                masked,
            )
            for r in range(2):
                for c in range(2):
                    p[r, c] = exp2(cute.math.fma(p[r, c], weighing.scale_log2, -exponents[r]))
            if self.weights_are_p:
                continue
            row, key = first_row + self.row(at, i, 0), visit.first_key + self.key(at, i, 0)
            kept = self.kept(p, weighing.dropout, row, key, visit.thread, i)
            self.round(kept, p_operand, i)
            if self.sparing:
                first_row = depend_on_load(p[1, 1], first_row)
            if self.problem.score is None:
                continue
            for r in range(2):
                for c in range(2):
                    slope = slopes if isinstance(slopes, float) else slopes[r, c]
                    p[r, c] = where(p[r, c] == 0.0, 0.0, p[r, c] * slope)

    def kept(
        self, p: cute.Tensor, dropout: Dropout | None, row: Int32, key: Int32, thread: Int32, i: int
    ) -> cute.Tensor:
        """An octet of P with -0 where dropout removes it; `drop` knows it by that. row, key: its first."""
        if dropout is None:
            return p
        kept, keeps = cute.make_rmem_tensor(p.layout, Float32), self.keeps(dropout, row, key, thread, i)
        for r in range(2):
            for c in range(2):
                kept[r, c] = where(keeps[r][c], p[r, c], -0.0)
        return kept

    def drop(self, dp: cute.Tensor, p_operand: cute.Tensor, keep_scale: Float32 | None) -> None:
        """What dropout does to dP: 0 where it left -0 of P."""
        if self.problem.dropout:
            pairs = cute.recast_tensor(p_operand, Uint32)
            for e in range(cute.size(dp)):
                is_dropped = (pairs[e // 2] & SIGNS[e % 2]) != 0
                dp[e] = where(is_dropped, 0.0, dp[e] * keep_scale)

    def differentiate(
        self, visit: Visit, dp: cute.Tensor, weights: cute.Tensor, p_operand: cute.Tensor,
        ds_operand: cute.Tensor, delta: cute.Tensor,
    ) -> None:
        """dS = weights * (dP - D) as an operand; and P, where the weights are P."""
        for i, shifts in self.by_octet(visit, delta):
            ds, weight = self.octet(dp, i), self.octet(weights, i)
            if self.weights_are_p:
                self.round(weight, p_operand, i)
            for r in range(2):
                for c in range(2):
                    ds[r, c] = weight[r, c] * self.difference(ds[r, c], shifts[r])
            self.round(ds, ds_operand, i)

    def difference(self, dp: Float32, delta: Float32) -> Float32:
        """dP - D."""
        return dp - delta

    def round(self, numbers: cute.Tensor, operand: cute.Tensor, i: int) -> None:
        """An octet's numbers into an operand, two in a register from here on."""
        rounded = cute.make_tensor(operand.iterator + 4 * i, cute.make_layout(4))
        rounded.store(cute.make_tensor(numbers.iterator, cute.make_layout(4)).load().to(self.dtype))
        pin(rounded)

    def octet(self, acc: cute.Tensor, i: int) -> cute.Tensor:
        """A thread's part of octet i of an accumulator's columns: two rows of Q x two keys."""
        return cute.make_tensor(acc.iterator + 4 * i, cute.make_layout((2, 2), stride=self.strides))


class Transposed(Elements):
    """Of S^T: keys are the 64 rows of a product, an octet is 8 rows of Q."""

    strides = (1, 2)

    def row(self, at: cute.Tensor, i: int, r: int) -> Int32:
        return at[0, 2 * i + r][1]

    def key(self, at: cute.Tensor, i: int, c: int) -> Int32:
        return at[c, 0][0]

    def by_octet(self, visit: Visit, numbers: cute.Tensor) -> Iterator[tuple[int, cute.Tensor]]:
        """Octets, and LSE or D of the two rows that a thread has, read when their turn comes."""
        lane = visit.thread % 4
        for i in range(self.columns // 8):
            pair = cute.make_rmem_tensor(2, Float32)
            cute.autovec_copy(cute.local_tile(numbers, (2,), (4 * i + lane,)), pair)
            yield i, pair

    def keeps(self, dropout: Dropout, row: Int32, key: Int32, thread: Int32, i: int) -> list[list]:
        """[row][key]: what dropout keeps of octet i."""
        return dropout.keeps(row, key, thread)


class Straight(Elements):
    """Of S: rows of Q are the 64 rows of a product, an octet is 8 keys."""

    strides = (2, 1)

    def row(self, at: cute.Tensor, i: int, r: int) -> Int32:
        return at[r, 0][0]

    def key(self, at: cute.Tensor, i: int, c: int) -> Int32:
        return at[0, 2 * i + c][1]

    def by_octet(self, visit: Visit, numbers: cute.Tensor) -> Iterator[tuple[int, cute.Tensor]]:
        """Octets, and LSE or D of the two rows that a thread has in all of them."""
        row = visit.thread // 32 * 16 + visit.thread % 32 // 4
        pair = [numbers[row], numbers[row + 8]]
        for i in range(self.columns // 8):
            yield i, pair

    def keeps(self, dropout: Dropout, row: Int32, key: Int32, thread: Int32, i: int) -> list[list]:
        """[row][key]: what dropout keeps of octet i, of the four that it draws together."""
        if i % 4 == 0:
            self.drawn = [dropout.keeps_in_row(row + 8 * r, key, thread) for r in range(2)]
        return [octets[i % 4] for octets in self.drawn]
