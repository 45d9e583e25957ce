"""FlashAttention-3 forward (Shah et al. 2024, algorithms 1 and 2) for sm_90a, of a cache of 8 bits.

    load      1 warp                  TMA: Q, then K[n] and V[n] of 8 bits, latest first
    widen     1 or 2 warpgroups       K and V of 16 bits, as products want them
    compute   1 or 2 of them          S = Q K, softmax, O += P V with wgmma; O by TMA

    load --q--> compute               Q once
    load --narrow_k, narrow_v--> widen    `stages` tiles of each
    widen --k, v--> compute           `wide` tiles of each

What is loaded and what is computed is as in the forward kernel.
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import pipeline

from ...common.channel import channel, channels_ready
from ...common.element import element_type, elements
from ...common.job import Launch
from ...common.memory import SmemAllocator, Tiles, allocate
from ...common.operand import Operand
from ...common.roles import Role, warp_specialize
from ...common.topology import Barriers
from ...common.wide_tile import Side, TileWidening, WideEnd
from ...widened import WidenedOperands, WidenedProblem, named
from ..forward.compute import ComputeEnds
from ..forward.kernel import ForwardKernel
from ..forward.load import Load, LoadEnds
from .compute import WidenedCompute
from .config import Config
from .topology import topology
from .widen import Widen, WidenEnds


class WidenedKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: WidenedProblem, config: Config):
        super().__init__(problem, config)
        self.topology = topology(config)
        # What TMA fills, by the names that the forward kernel has for it, and what is made of it.
        wide = (Operand.of(problem.precision, o.rows, o.dim, config.wide, False) for o in (self.k, self.v))
        self.wide_k, self.wide_v = wide
        self.k, self.v = (
            Operand.of(problem.kv_precision, o.rows, o.dim, o.stages, o.ragged).in_pages(o.page_size)
            for o in (self.k, self.v)
        )

    def named(self, operands: list) -> WidenedOperands:
        """With elements for the bytes that k and v are passed as."""
        call, dtype = named(operands), element_type(self.problem.kv_precision)
        return call._replace(k=elements(call.k, dtype), v=elements(call.v, dtype))

    @cute.kernel
    def kernel(self, launch: Launch):
        config, links = self.config, self.topology
        tiles, narrow_k, narrow_v, barriers = self.shared_memory()
        q = channel(barriers, links["q"], config.consumers * self.q.bytes)
        k = channel(barriers, links["narrow_k"], self.k.bytes)
        v = channel(barriers, links["narrow_v"], self.v.bytes)
        wide = [consumer(barriers, links[name]) for name in "kv"]
        channels_ready()
        warps = 4 * config.wideners
        load = Load(self.problem, config, self.q, self.k, self.v)
        widened = TileWidening(self.k, self.wide_k, warps), TileWidening(self.v, self.wide_v, warps)
        widen = Widen(self.problem, config, *widened)
        compute = WidenedCompute(self.problem, config, self.out)
        sides = (
            Side(narrow_k, tiles.k, WideEnd.at(barriers, links["k"])),
            Side(narrow_v, tiles.v, WideEnd.at(barriers, links["v"])),
        )
        loaded, ends = tiles._replace(k=narrow_k, v=narrow_v), LoadEnds(q.producer, k.producer, v.producer)
        between = WidenEnds(k.consumer, v.consumer)
        roles = (
            Role(partial(load.run, launch, loaded, ends), 1, config.producer_registers),
            Role(partial(widen.run, launch, *sides, between), config.wideners, config.widener_registers),
            Role(
                partial(compute.run, launch, tiles, ComputeEnds(q.consumer, *wide)),
                config.consumers,
                config.consumer_registers,
            ),
        )
        warpgroup = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        warp_specialize(roles, config.launch_registers, warpgroup)

    def shared_memory(self) -> tuple[Tiles, cute.Tensor, cute.Tensor, cute.Pointer]:
        """The tiles of 16 bits, those of 8, and the barriers of all links."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        tiles = Tiles.allocate(smem, self.q, self.wide_k, self.wide_v, self.out, apart=False)
        return tiles, allocate(smem, self.k), allocate(smem, self.v), barriers


def consumer(base: cute.Pointer, barriers: Barriers) -> pipeline.PipelineConsumer:
    """Who empties an edge's slots, in the words of a channel's end; warps fill them. Makes the barriers."""
    warps = (
        pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        for arrivals in (barriers.full_arrivals, barriers.empty_arrivals)
    )
    made = pipeline.PipelineTmaAsync.create(
        barrier_storage=base + barriers.first,
        num_stages=barriers.slots,
        tx_count=0,
        producer_group=next(warps),
        consumer_group=next(warps),
        cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        defer_sync=True,
    )
    return made.make_participants()[1]
