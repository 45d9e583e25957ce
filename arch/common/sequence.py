"""Where one sequence of a batch begins and ends, and its rows of q, k, v and out.

Dense operands are (batch, seq, heads, dim); packed ones are (total, heads, dim) with `cu_seqlens`.
A used length (`seqused`) replaces the sequence's length; its rows begin at the same place. Keys in a cache
are dense whether queries are or not: in a row of it, from the first in use on, or in pages.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..problem import Operands


class Sequence(NamedTuple):
    """One sequence as the kernel sees it; all Int32.

    q_start, k_start: its first row in packed operands, 0 in dense ones; in a cache its first key in use.
    q_rows, k_rows: rows that it has in q and out, and in k and v; `seqlen_q`, `seqlen_k` of them are in use.
    k_batch: its number among the sequences of k and v, where those are not packed.
    """

    batch: Int32
    q_start: Int32
    k_start: Int32
    q_rows: Int32
    k_rows: Int32
    seqlen_q: Int32
    seqlen_k: Int32
    k_batch: Int32

    @property
    def offset(self) -> Int32:
        """Position on the key axis of query row 0: the last query stands at the last key."""
        return self.seqlen_k - self.seqlen_q

    def q_rows_of(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows, dim) of q or out, of one query head."""
        return rows_of_head(tensor, self.batch, self.q_start, head)

    def q_heads_of(self, tensor: cute.Tensor) -> cute.Tensor:
        """(rows, heads, dim) of q or out."""
        if cute.rank(tensor) == 4:
            return tensor[self.batch, None, None, None]
        return cute.domain_offset((self.q_start, 0, 0), tensor)

    def k_rows_of(self, tensor: cute.Tensor, head: Int32) -> cute.Tensor:
        """(rows, dim) of k or v, of one KV head."""
        return rows_of_head(tensor, self.k_batch, self.k_start, head)

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
    """The sequence `batch` of a call, as if its keys were the first of row `batch` of a cache if in one."""
    starts_q, starts_k = operands.cu_seqlens_q, operands.cu_seqlens_k
    if starts_q is None:
        q_start, k_start = Int32(0), Int32(0)
        q_rows, k_rows = operands.q.shape[1], operands.k.shape[1]
    elif starts_k is None:
        q_start, k_start = starts_q[batch], Int32(0)
        q_rows, k_rows = starts_q[batch + 1] - q_start, operands.k.shape[1]
    else:
        q_start, k_start = starts_q[batch], starts_k[batch]
        q_rows = starts_q[batch + 1] - q_start
        k_rows = starts_k[batch + 1] - k_start
    seqlen_q = q_rows if operands.seqused_q is None else operands.seqused_q[batch]
    seqlen_k = k_rows if operands.seqused_k is None else operands.seqused_k[batch]
    return Sequence(batch, q_start, k_start, q_rows, k_rows, seqlen_q, seqlen_k, batch)


def cached_sequence_of(operands: Operands, batch: Int32) -> Sequence:
    """The sequence `batch` of a call, whose keys may lie in a cache."""
    sequence = sequence_of(operands, batch)
    if operands.batch_idx is not None:
        sequence = sequence._replace(k_batch=operands.batch_idx[batch])
    if operands.leftpad is not None:
        first = operands.leftpad[batch]
        sequence = sequence._replace(k_start=first, seqlen_k=sequence.seqlen_k - first)
    if operands.page_table is not None:
        sequence = sequence._replace(k_start=Int32(0))
    return sequence
