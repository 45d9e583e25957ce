"""Views of matrix-instruction accumulators.

An accumulator of mma.sync or wgmma is ((column pair, row pair, ...), M, N): the words here regroup it,
without moving a register, as rows × columns, or as the A operand of the next product.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass.cute as cute


def rows_by_columns(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, ...), M, N) -> ((2, M), (2, ..., N)): one thread's rows × its columns."""
    view = _regrouped(acc.layout, lambda pair, m, n: ((pair[1], m), (pair[0], *pair[2:], n)))
    return cute.make_tensor(acc.iterator, view)


def some_rows(view: cute.Tensor, first: int, count: int) -> cute.Tensor:
    """`count` rows of (rows, columns), from `first` on: one, or all."""
    if count == cute.size(view, mode=[0]):
        return view
    row = view[first, None]
    layout = cute.make_layout((1, row.layout.shape), stride=(0, row.layout.stride))
    return cute.make_tensor(row.iterator, layout)


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2), M, N) of m16n8 -> ((2, 2, 2), M, N / 2): the accumulator as the next product's A."""
    halves = cute.logical_divide(acc.layout, (None, None, 2))  # ((2, 2), M, (2, N / 2))
    view = _regrouped(halves, lambda pair, m, n: ((*pair, n[0]), m, n[1]))
    return cute.make_tensor(acc.iterator, view)


def _regrouped(layout: cute.Layout, regroup: Callable) -> cute.Layout:
    return cute.make_layout(regroup(*layout.shape), stride=regroup(*layout.stride))
