"""Where one sequence of a batch begins and ends, and its rows of q, k, v and out.

Dense operands are (batch, seq, heads, dim); packed ones are (total, heads, dim) with `cu_seqlens`.
A used length (`seqused`) replaces the sequence's length; its rows begin at the same place.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..problem import Operands


class Sequence(NamedTuple):
    """One sequence as the kernel sees it; all Int32.

    q_start, k_start: its first row in packed operands, 0 in dense ones.
    q_rows, k_rows: rows that it has in q and out, and in k and v; `seqlen_q`, `seqlen_k` of them are in use.
    """

    batch: Int32
    q_start: Int32
    k_start: Int32
    q_rows: Int32
    k_rows: Int32
    seqlen_q: Int32
    seqlen_k: Int32

    @property
    def offset(self) -> Int32:
        """Position on the key axis of query row 0: the last query stands at the last key."""
        return self.seqlen_k - self.seqlen_q

    def q_rows_of(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows, dim) of q or out, of one query head."""
        return rows_of_head(tensor, self.batch, self.q_start, head)

    def k_rows_of(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows, dim) of k or v, of one KV head."""
        return rows_of_head(tensor, self.batch, self.k_start, head)

    def lse_of(self, lse: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows,) of the log-sum-exp (batch, heads, rows) or (heads, total), of one query head."""
        return numbers_of_head(lse, self.batch, self.q_start, head)


def rows_of_head(tensor: cute.Tensor, batch: Int32, start: Int32, head: Int32) -> cute.Tensor:
    """(rows, dim) of a dense or, from row `start` on, a packed tensor."""
    if cute.rank(tensor) == 4:
        return tensor[batch, None, head, None]
    return cute.domain_offset((start, 0), tensor[None, head, None])


def numbers_of_head(numbers: cute.Tensor, batch: Int32, start: Int32, head: Int32) -> cute.Tensor:
    """(rows,) of a dense (batch, heads, rows) or, from row `start` on, a packed (heads, total) tensor."""
    if cute.rank(numbers) == 3:
        return numbers[batch, head, None]
    return cute.domain_offset((start,), numbers[head, None])


def extent(
    rows: cute.Tensor, cu_seqlens: cute.Tensor | None, longest: Int32 | None
) -> tuple[Int32, Int32]:
    """(rows of the longest sequence, sequences) of a call. rows: an operand that has them."""
    if cu_seqlens is None:
        return rows.shape[1], rows.shape[0]
    return longest, cu_seqlens.shape[0] - 1


def sequence_of(operands: Operands, batch: Int32) -> Sequence:
    """The sequence `batch` of a call."""
    if operands.cu_seqlens_q is None:
        q_start, k_start = Int32(0), Int32(0)
        q_rows, k_rows = operands.q.shape[1], operands.k.shape[1]
    else:
        q_start, k_start = operands.cu_seqlens_q[batch], operands.cu_seqlens_k[batch]
        q_rows = operands.cu_seqlens_q[batch + 1] - q_start
        k_rows = operands.cu_seqlens_k[batch + 1] - k_start
    seqlen_q = q_rows if operands.seqused_q is None else operands.seqused_q[batch]
    seqlen_k = k_rows if operands.seqused_k is None else operands.seqused_k[batch]
    return Sequence(batch, q_start, k_start, q_rows, k_rows, seqlen_q, seqlen_k)
