"""FlashAttention-4 forward (Zadouri et al. 2026) for sm_100a, sm_103a and sm_110a, of a cache of 8 bits.

    widen        4 warps    K and V of 16 bits, as products want them

    load --q--> mma                        a stage for each Q tile
    load --narrow_k, narrow_v--> widen     tiles of 8 bits
    widen --k, v--> mma                    `wide` tiles of 16 bits, of each
    mma --s--> softmax, correction         `slots` for each Q tile; back when P is stored and O rescaled
    softmax --tail--> mma                  P's last columns, one for each S: P V has begun without them
    softmax --factors--> correction        one for each S
    softmax --final_scale--> correction    one for each Q tile: what normalises O
    mma --o--> correction                  one for each Q tile: O after its last block, or after each
    correction --out--> store              one for each Q tile: O in 16 bits, in Q's place

The other roles are those of the forward kernel; CTAs work alone, and take one tile.
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, pipeline

from ...common.channel import Channel, channel, mma_channel
from ...common.element import element_type, elements
from ...common.job import Launch
from ...common.memory import SmemAllocator, Tiles, allocate
from ...common.operand import Operand
from ...common.roles import Role, specialize_warps
from ...common.topology import Barriers
from ...common.wide_tile import Side, TileWidening, WideEnd
from ...widened import WidenedOperands, WidenedProblem, named
from ..config import TILE_M
from ..forward.job import Edges
from ..forward.kernel import ForwardKernel
from .config import WIDENERS, Config
from .softmax import WidenedSoftmax
from .topology import topology
from .widen import Memory, NarrowLoad, Widen, WidenEnds

EDGES = ("s", "factors", "final_scale", "o", "out", "tail")


class WidenedKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    softmax_role = WidenedSoftmax
    load_role = NarrowLoad

    def __init__(self, problem: WidenedProblem, config: Config):
        super().__init__(problem, config)
        self.topology = topology(problem, config)
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

    @cute.jit
    def work(self, launch: Launch):
        plan, group, links = self.plan, self.group, self.topology
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory, barriers, answers = self.shared_memory()
        q = mma_channel(barriers, links["q"], self.q.bytes)
        k, v = (
            channel(barriers, links[f"narrow_{name}"], operand.bytes)
            for name, operand in (("k", self.k), ("v", self.v))
        )
        products = [consumer(barriers, links[name]) for name in "kv"]
        edges = self.edges(barriers, answers, warp)
        if warp == 0:
            group.allocate(plan.allocated, memory.address)
        group.ready()
        shared = launch, memory, edges
        ends = (Channel(narrow.producer, wide) for narrow, wide in zip((k, v), products, strict=True))
        roles = self.with_wideners(self.roles(*shared, q, *ends), shared, WidenEnds(k.consumer, v.consumer))
        specialize_warps(roles, self.config.launch_registers, warp)
        group.sync()
        if warp == 0:
            group.free(memory.looked_up().tensor, plan.allocated)

    def with_wideners(
        self, roles: tuple[Role, ...], shared: tuple[Launch, Memory, Edges], ends: WidenEnds
    ) -> tuple[Role, ...]:
        """Between the roles of whole warpgroups and those of a warp."""
        widened = (
            TileWidening(narrow, wide, WIDENERS)
            for narrow, wide in ((self.k, self.wide_k), (self.v, self.wide_v))
        )
        widen = partial(self.run, Widen(self.problem, self.config, *widened), *shared, ends)
        return *roles[:2], Role(widen, WIDENERS, self.config.widener_registers), *roles[2:]

    def edge_barriers(self) -> dict[str, Barriers]:
        """Of the links without channels."""
        return {link.name: placed for link, placed in self.topology.placed() if link.name in EDGES}

    def shared_memory(self) -> tuple[Memory, cute.Pointer, None]:
        """What the roles share, and the barriers."""
        config, smem = self.config, SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        address = smem.allocate_array(cutlass.Int32, 1)
        shape = (TILE_M, config.slots + 1, config.tiles)
        factors = smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=16)
        tiles = Tiles.allocate(smem, self.q, self.wide_k, self.wide_v, self.out, apart=False)
        sides = (
            Side(allocate(smem, operand), wide, WideEnd.at(barriers, self.topology[name]))
            for name, operand, wide in (("k", self.k, tiles.k), ("v", self.v, tiles.v))
        )
        return Memory(tiles, factors, address, *sides), barriers, None


def consumer(base: cute.Pointer, barriers: Barriers) -> pipeline.PipelineConsumer:
    """The mma role's end of a link that warps fill. Makes the barriers."""
    made = pipeline.PipelineTmaUmma.create(
        barrier_storage=base + barriers.first,
        num_stages=barriers.slots,
        tx_count=0,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, barriers.full_arrivals),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        defer_sync=True,
    )
    return made.make_participants()[1]
