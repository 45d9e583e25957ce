"""The forward kernel with keys and values of 8 bits, which are widened between their copy and their use.

Nothing else differs: the scale of a head's keys is part of the softmax scale, that of its values of what
normalises the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Uint8

from ...common.blocks import Listed, Range
from ...common.memory import SmemAllocator
from ...common.rules import Rules
from ...common.schedule import InOrder, InSections, OneTile
from ...common.widen import Widening, of_head
from ...widened import WidenedOperands, WidenedProblem, named
from ..copy import tile_layout
from ..forward import ForwardKernel
from ..job import RowBlock, Walk
from ..kv import KvStream
from ..rows import keys_of
from ..store import Partial, Result
from .config import Config
from .load import NarrowCopy, NarrowLoader, NarrowSource


class NarrowTiles(NamedTuple):
    """As `Tiles`. narrow_k, narrow_v: tiles of 8 bits, `stages` of each."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    narrow_k: cute.Pointer
    narrow_v: cute.Pointer


class _Scaled:
    """Of a store whose O is of V as it lies in the cache."""

    def finish(self, walk: Walk, lse: cute.Tensor | None, o: cute.Tensor, row_of: Callable) -> None:
        """With V's scale."""
        block = walk.block
        _, scale = of_head(block.call, block.sequence.batch, block.heads.kv)
        for i in range(cute.size(walk.acc_o)):
            walk.acc_o[i] = walk.acc_o[i] * scale
        super().finish(walk, lse, o, row_of)


class ScaledResult(_Scaled, Result):
    """Rows of the result."""


class ScaledPartial(_Scaled, Partial):
    """One split's part of them."""


class WidenedKernel(ForwardKernel):
    """Another way for K and V."""

    def __init__(self, problem: WidenedProblem, config: Config):
        super().__init__(problem, config)
        widening, out = Widening.of(problem), self.store
        copies = (
            NarrowCopy(Uint8, config.tile_n, dim, padded, config.threads, 1, widening, self.dtype)
            for dim, padded in ((problem.head_dim, self.dim), (problem.head_dim_v, self.dim_v))
        )
        self.kv = NarrowLoader(*copies, config.tile_n, config.stages)
        chosen = problem, config
        self.store = ScaledPartial(*chosen) if problem.split_kv else ScaledResult(*chosen, out.copy)

    def named(self, operands: list) -> WidenedOperands:
        """The operands of a launch, in their order, by their names."""
        return named(operands)

    @cute.kernel
    def kernel(self, call: WidenedOperands, schedule: OneTile | InSections | InOrder, group_size: Int32):
        self.work(call, schedule, group_size)

    def tiles(self) -> NarrowTiles:
        config, smem = self.config, SmemAllocator()
        wider = tile_layout(config.tile_m, max(self.dim, self.dim_v), 1)
        q_or_out = smem.allocate_tensor(self.dtype, wider, byte_alignment=128).iterator
        wide = (
            smem.allocate_tensor(self.dtype, tile_layout(config.tile_n, dim, 1), byte_alignment=128)
            for dim in (self.dim, self.dim_v)
        )
        q, out = (
            cute.make_tensor(q_or_out, tile_layout(config.tile_m, n, 1)) for n in (self.dim, self.dim_v)
        )
        narrow = (
            smem.allocate_array(Uint8, config.stages * config.tile_n * dim, byte_alignment=16)
            for dim in (self.dim, self.dim_v)
        )
        return NarrowTiles(q, *wide, out, *narrow)

    def stream(self, block: RowBlock, tiles: NarrowTiles, visits: Range | Listed) -> KvStream:
        call, sequence = block.call, block.sequence
        sources = []
        for tensor, narrow, wide in (
            (call.k, tiles.narrow_k, tiles.k), (call.v, tiles.narrow_v, tiles.v)
        ):  # fmt: skip
            rows = keys_of(self.problem, call, sequence, tensor, block.heads.kv)
            sources.append(NarrowSource(rows, narrow, wide))
        return KvStream(*sources, visits, sequence.seqlen_k, block.thread)

    def walk(self, block: RowBlock, tiles: NarrowTiles, stream: KvStream, rules: Rules) -> Walk:
        call, _ = of_head(block.call, block.sequence.batch, block.heads.kv)
        rules = rules._replace(scale=call.softmax_scale)
        walk = super().walk(block._replace(call=call), tiles, stream, rules)
        return walk._replace(block=block)
