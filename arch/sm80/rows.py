"""Global rows as copies find them: one after the other in a tensor, in pages, of several heads in turns."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from ..common.heads import TileHeads, row_of
from ..common.sequence import Sequence
from ..elementwise import minimum
from ..problem import Operands, Problem


class Pages(NamedTuple):
    """The rows of one head from row `first` of a sequence on; `last` is the last one in use.

    pages: (pages, page size, dim). table: (pages,) of the sequence; nothing is looked up there behind `last`.
    """

    pages: cute.Tensor
    table: cute.Tensor
    first: Int32
    last: Int32

    def row(self, r: Int32 | int, heads: int) -> cute.Tensor:
        """(dim,) of row `r` from the first on; behind the last one in use that one."""
        at, size = Uint32(minimum(self.first + r, self.last)), self.pages.shape[1]
        return self.pages[self.table[Int32(at // size)], Int32(at % size), None]


class Shared(NamedTuple):
    """Rows of a tile that several heads share, from row `first` of the tile on.

    rows: (rows, heads, dim) of the sequence. heads: the tile's. first_row, last_row: of the sequence, the
    tile's first and the last that exists.
    """

    rows: cute.Tensor
    heads: TileHeads
    first_row: Int32
    last_row: Int32
    first: Int32

    def row(self, r: Int32 | int, heads: int) -> cute.Tensor:
        """(dim,) of row `r` from the first on; of one that does not exist, a row that does."""
        row, head = self._place(r, heads)
        return self.rows[minimum(row, self.last_row), self.heads.known(heads, head), None]

    def exists(self, r: Int32 | int, heads: int) -> Boolean:
        """Whether there is such a row."""
        row, head = self._place(r, heads)
        return (row <= self.last_row) & (head < self.heads.end)

    def _place(self, r: Int32 | int, heads: int) -> tuple[Int32, Int32]:
        """Its row in the sequence, and its head."""
        at = self.first + r
        return row_of(heads, self.first_row, at), self.heads.of_row(heads, at)


LookedUp = (Pages, Shared)
Rows = cute.Tensor | Pages | Shared  # a tensor: (rows, dim)


def beyond(rows: Rows, first: Int32) -> Rows:
    """The rows from `first` on."""
    if isinstance(rows, LookedUp):
        return rows._replace(first=rows.first + first)
    return cute.domain_offset((first, 0), rows)


def keys_of(problem: Problem, call: Operands, sequence: Sequence, tensor: cute.Tensor, head: Int32) -> Rows:
    """A sequence's rows of k or v, of one KV head, wherever they lie."""
    if problem.page_size:
        table, pages = call.page_table[sequence.batch, None], tensor[None, None, head, None]
        return Pages(pages, table, Int32(0), sequence.seqlen_k - 1)
    rows = sequence.k_rows_of(tensor, head)
    if problem.cache and problem.cache.leftpad:
        rows = cute.domain_offset((sequence.k_start, 0), rows)
    return rows
