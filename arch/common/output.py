"""What becomes of a thread's rows in the end: O normalised, the log-sum-exp written."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr, range_constexpr

from ..elementwise import where
from ..problem import Problem
from .softmax import OnlineSoftmax


class OutputRows(NamedTuple):
    """Rows of one head of one sequence.

    used: rows from it on are out of use: 0, and -inf in `lse`; None where all are in use.
    lse: (rows,) fp32 to write, or None; `end` rows exist.
    sink: score of the head's sink, or None. factor: of the whole output, or None.
    """

    used: Int32 | None
    end: Int32
    lse: cute.Tensor | None
    sink: Float32 | None
    factor: Float32 | None

    @staticmethod
    def of(problem: Problem, job: Any, head: Int32, lse: cute.Tensor | None) -> OutputRows:
        """Of a head of a tile. job: what has the tile's call and sequence. lse: the operand that holds it."""
        call, sequence = job.call, job.sequence
        return OutputRows(
            used=sequence.seqlen_q if problem.seqused_q else None,
            end=sequence.q_rows,
            lse=sequence.lse_of(lse, head) if problem.lse else None,
            sink=call.sink[head] if problem.sink else None,
            factor=call.keep_scale if problem.dropout else None,
        )

    @cute.jit
    def finish(self, o: cute.Tensor, softmax: OnlineSoftmax, row_of: Constexpr, writes_lse: Boolean):
        """Normalise O (rows, columns) in place, and write the log-sum-exp of each row.

        row_of(r): row in the sequence. writes_lse: in one of the lanes that share the rows.
        """
        for r in range_constexpr(cute.size(o, mode=[0])):
            factor = self.close(softmax, r, row_of(r), writes_lse)
            for c in range_constexpr(cute.size(o, mode=[1])):
                o[r, c] = where(factor == 0.0, 0.0, o[r, c] * factor)

    @cute.jit
    def close(self, softmax: OnlineSoftmax, r: Constexpr, row: Int32, writes_lse: Boolean):
        """The factor that normalises row r of `softmax`, 0 for a row of zeros; writes its log-sum-exp."""
        factor, lse = softmax.finish(r, self.sink)
        if const_expr(self.factor is not None):
            factor = factor * self.factor
        if const_expr(self.used is not None):
            factor, lse = where(row < self.used, factor, 0.0), where(row < self.used, lse, -Float32.inf)
        if const_expr(self.lse is not None):
            self._write_lse(row, lse, writes_lse & (row < self.end))
        return factor

    @cute.jit
    def _write_lse(self, row: Int32, lse: Float32, due: Boolean):
        if due:
            self.lse[row] = lse


def of_split(tensor: cute.Tensor, split: Int32) -> cute.Tensor:
    """One split's part of an operand whose first dimension counts the splits."""
    return tensor[(split, *(None,) * (cute.rank(tensor) - 1))]


@cute.jit
def write_pairs(row: cute.Tensor, target: cute.Tensor, column_of: Constexpr, dim: Constexpr):
    """A thread's columns (1, columns) of a row, two neighbours at a time, to global (dim,).

    Four lanes share the row. column_of(c): column in the row; those from `dim` on are left out.
    """
    columns = cute.size(row, mode=[1])
    for c in range_constexpr(0, columns, 2):
        column, inside = column_of(c), True
        if const_expr(4 * columns > dim):
            inside = column < dim
        if inside:
            pair = cute.make_rmem_tensor(2, Float32)
            pair[0], pair[1] = row[0, c], row[0, c + 1]
            cute.autovec_copy(pair, cute.local_tile(target, (2,), (column // 2,)))
