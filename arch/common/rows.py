"""One side of one sequence, queries or keys, for kernels that see only that: its rows, also of scratch."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..backward import first_scratch_row
from ..problem import Problem
from .sequence import Sequence, numbers_of_head, rows_of_head


class Rows(NamedTuple):
    """Rows of one sequence. start: its first, where sequences are packed; scratch: its first of scratch."""

    batch: Int32
    start: Int32
    count: Int32
    scratch: Int32

    def of(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows, dim) of a tensor like q or k, of one head."""
        return rows_of_head(tensor, self.batch, self.start, head)

    def by_head(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows,) of a tensor like the log-sum-exp, of one head."""
        return numbers_of_head(tensor, self.batch, self.start, head)


def rows_of(cu_seqlens: cute.Tensor | None, seqlen: Int32, batch: Int32) -> Rows:
    """The rows of sequence `batch`; seqlen: of each where they are dense."""
    packed = const_expr(cu_seqlens is not None)
    start, count = Int32(0), seqlen
    if packed:
        start = cu_seqlens[batch]
        count = cu_seqlens[batch + 1] - start
    return Rows(batch, start, count, scratch_row(packed, start, count, batch))


def scratch_row(packed: bool, start: Int32, count: Int32, batch: Int32) -> Int32:
    """The first scratch row of sequence `batch` of `count` rows. start: its first row where it is packed."""
    return first_scratch_row(start if packed else batch * count, batch)


def scratch_row_q(problem: Problem, sequence: Sequence) -> Int32:
    """The first scratch row of a sequence on the query side."""
    return scratch_row(problem.varlen, sequence.q_start, sequence.q_rows, sequence.batch)


def scratch_row_k(problem: Problem, sequence: Sequence) -> Int32:
    """The first scratch row of a sequence on the keys' side."""
    return scratch_row(problem.varlen, sequence.k_start, sequence.k_rows, sequence.batch)
