"""The five products: what they multiply, and where in tensor memory their results are.

    S^T = K Q^T       dP^T = V dO^T       keys x rows; both operands in shared memory
    dV += P^T dO      dK += dS^T Q        keys x columns; P^T and dS^T in tensor memory, or as `wide` has them
    dQ = dS K                             rows x columns, in parts; dS lies in shared memory transposed

A tiled product carries its accumulate flag along, so that each use makes its own. A pair's takes half of A's
rows, and half of B's columns of the result, from each CTA: what is one's own is partitioned as by a product
with just that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cutlass.cute as cute

from ...common.operand import transposed
from ..group import ALONE, Group
from ..mma import MN, SMEM, TMEM, K, tiled_mma
from .config import WARPGROUPS
from .plan import Plan


@dataclass(frozen=True)
class Products:
    """dtype: of q, k, v and dO. p_dtype, ds_dtype: of P and dS, of as many bits. plan: where results are.
    group: of CTAs.
    """

    dtype: type
    p_dtype: type
    ds_dtype: type
    plan: Plan
    group: Group

    def scores(self, group: Group) -> cute.TiledMma:
        """Of S^T and dP^T. group: all of it, or ALONE: what is a CTA's own."""
        return tiled_mma(self.dtype, self.share(self.plan.rows, group), SMEM, K, group, rows=self.plan.keys)

    def grad_kv(self, weights: str, columns: int, group: Group) -> cute.TiledMma:
        """Of dV or dK, whose weights are "p" or "ds", likewise."""
        source = SMEM if self.plan.shared_weights else TMEM
        return tiled_mma(
            self.dtype, self.share(columns, group), source, MN, group, rows=self.plan.keys,
            a_dtype=self.of_weights(weights),
        )

    def of_weights(self, name: str) -> type:
        """What P or dS is rounded to."""
        return self.p_dtype if name == "p" else self.ds_dtype

    def grad_q(self, filling: int, group: Group) -> cute.TiledMma:
        """Of a filling of dQ's columns, likewise."""
        rows, columns = self.plan.grad_q_shape(filling)
        return tiled_mma(self.dtype, self.share(columns, group), SMEM, MN, group, MN, rows, self.ds_dtype)

    def share(self, columns: int, group: Group) -> int:
        """Of all columns those that `group` has."""
        return columns * group.ctas // self.group.ctas

    def keys(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, keys, k, tiles) of K or V (keys, dim, tiles), as A of S^T or dP^T."""
        return as_a(self.scores, self.group, tiles)

    def rows(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, rows, k, tiles) of Q or dO (rows, dim, tiles), as B of S^T or dP^T."""
        return as_b(self.scores, self.group, tiles)

    def columns(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, columns, k, tiles) of Q or dO, as B of dK or dV."""
        columns = cute.size(tiles, mode=[1]) * self.group.ctas
        return as_b(partial(self.grad_kv, "p", columns), self.group, transposed(tiles))

    def ds(self, tiles: cute.Tensor) -> cute.Tensor:
        """Descriptors (mma, rows, k, tiles) of dS^T (keys, rows, tiles), as A of dQ."""
        return as_a(partial(self.grad_q, 0), self.group, transposed(tiles))

    def k_of_grad_q(self, tiles: cute.Tensor, column: int, filling: int) -> cute.Tensor:
        """Descriptors (mma, columns, k, tiles) of a filling's columns of K, `column` and on, as B of dQ."""
        keys, count = cute.size(tiles, mode=[0]), cute.size(tiles, mode=[2])
        width = self.plan.width(filling)
        part = cute.local_tile(transposed(tiles), (width, keys, count), (column // width, 0, 0))
        return as_b(partial(self.grad_q, filling), self.group, part)

    def result(self, mma: cute.TiledMma, base: cute.Pointer, at: int, shape: tuple[int, int]) -> cute.Tensor:
        """What a product writes, of a CTA's (rows, columns), from place `at` of tensor memory on."""
        rows, columns = shape
        layout = mma.make_fragment_C(mma.partition_shape_C((rows * self.group.ctas, columns))).layout
        return cute.make_tensor(base + at, layout)

    def weights(self, base: cute.Pointer, name: str, columns: int) -> cute.Tensor:
        """P^T or dS^T in tensor memory as A of dV or dK: (mma, keys, k), several elements to a column.

        Each warpgroup's rows of Q are neighbours.
        """
        pointer = cute.recast_ptr(base + self.plan.at(name), dtype=self.of_weights(name))
        rows = self.plan.half_rows
        part = cute.make_tensor(pointer, cute.make_layout((self.plan.keys, rows), stride=(rows, 1)))
        layout = as_a(partial(self.grad_kv, name, columns), self.group, part).layout
        (within, keys, k), (within_step, keys_step, k_step) = layout.shape, layout.stride
        # A fragment in tensor memory has a layout, but always begins at column 0.
        steps = k_step, self.plan.per_column * self.plan.step(name)
        halves = cute.make_layout((within, keys, (k, WARPGROUPS)), stride=(within_step, keys_step, steps))
        return cute.make_tensor(pointer, halves)


def as_a(mma: Callable[[Group], cute.TiledMma], group: Group, tiles: cute.Tensor) -> cute.Tensor:
    """A CTA's tiles (rows, k, tiles) as operands of a product of the group."""
    return mma(group).make_fragment_A(mma(ALONE).get_slice(0).partition_A(tiles))


def as_b(mma: Callable[[Group], cute.TiledMma], group: Group, tiles: cute.Tensor) -> cute.Tensor:
    """A CTA's tiles (columns, k, tiles) as operands of a product of the group."""
    return mma(group).make_fragment_B(mma(ALONE).get_slice(0).partition_B(tiles))
