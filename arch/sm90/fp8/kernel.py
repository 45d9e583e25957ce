"""FlashAttention-3's forward pass in FP8 (Shah et al. 2024, section 3.3) for sm_90a.

    load        1 warp            TMA: Q, then K[n] and V[n], latest first
    transpose   3 warps           V, of which a product wants keys next to each other
    compute     2 warpgroups      S = Q K, softmax, O += P V with wgmma; O by TMA

    load --q, k--> compute        Q once, K `stages` tiles
    load --v--> transpose --transposed--> compute

A tile is 128 rows of a query head, with all keys or one split of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...common.channel import channel, channels_ready
from ...common.element import element_type, elements
from ...common.job import Launch
from ...common.memory import SmemAllocator, Tiles, allocate
from ...common.operand import Operand
from ...common.roles import Role, warp_specialize
from ...quantized import QuantizedOperands, QuantizedProblem, named
from ..edge import Edge
from ..forward.kernel import ForwardKernel
from ..forward.load import Load, LoadEnds
from ..mma import ROWS
from .compute import AllTiles, Ends, QuantizedCompute
from .config import TRANSPOSED, Config
from .topology import topology
from .transpose import Transpose, TransposeEnds


class QuantizedKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: QuantizedProblem, config: Config):
        if problem.block and config.promotion != 1:
            raise ValueError(
                f"promotion is {config.promotion} with scales of blocks of V: products of several tiles "
                "in one accumulator, have no scale in common; allowed: 1"
            )
        self.problem, self.config, self.topology = problem, config, topology(config)
        precision, dim, dim_v = problem.precision, problem.head_dim, problem.head_dim_v
        columns = precision.padded(dim_v)  # of a product: of the result those beyond its own are not written
        self.q = Operand.of(precision, ROWS, dim, config.consumers, problem.varlen)
        self.out = Operand.of(problem.out_precision, ROWS, columns, config.consumers, problem.varlen)
        if not config.keeps_q:
            # A warpgroup's O takes the place of its own Q.
            nbytes = max(self.q.bytes, self.out.bytes)
            self.q, self.out = (replace(x, pitch=nbytes * 8 // x.precision.bits) for x in (self.q, self.out))
        k = Operand.of(precision, config.tile_n, dim, config.stages, problem.ragged_k)
        v = Operand.of(precision, config.tile_n, dim_v, config.stages, problem.ragged_k)
        self.k, self.v = k.in_pages(problem.page_size), v.in_pages(problem.page_size)
        self.transposed = Operand.of(precision, columns, config.tile_n, TRANSPOSED, False)

    def named(self, operands: list) -> QuantizedOperands:
        """With elements for the bytes that tensors of 8 bits are passed as."""
        call, dtype = named(operands), element_type(self.problem.precision)
        q, k, v = (elements(x, dtype) for x in (call.q, call.k, call.v))
        return call._replace(q=q, k=k, v=v)

    @cute.kernel
    def kernel(self, launch: Launch):
        config, links = self.config, self.topology
        tiles, transposed, barriers = self.shared_memory()
        q = channel(barriers, links["q"], config.consumers * self.q.bytes)
        k = channel(barriers, links["k"], self.k.bytes)
        v = channel(barriers, links["v"], self.v.bytes)
        edge = Edge.at(barriers, links["transposed"])
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            with cute.arch.elect_one():
                edge.make(links["transposed"])
        channels_ready()
        load = Load(self.problem, config, self.q, self.k, self.v)
        transpose = Transpose(self.problem, config, self.v, self.transposed)
        compute = QuantizedCompute(self.problem, config, self.q, self.out)
        producers = LoadEnds(q.producer, k.producer, v.producer)
        every, consumers = AllTiles(tiles, transposed), Ends(q.consumer, k.consumer)
        arguments = launch, every, producers, TransposeEnds(v.consumer, edge)
        roles = (
            Role(partial(feed, load, transpose, arguments), 1, config.producer_registers),
            Role(
                partial(compute.run, launch, every, consumers, edge),
                config.consumers,
                config.consumer_registers,
            ),
        )
        warp_specialize(roles, config.launch_registers, warp // 4)

    def shared_memory(self) -> tuple[Tiles, cute.Tensor, cute.Pointer]:
        """The tiles, V transposed, and the barriers of all links."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        tiles = Tiles.allocate(smem, self.q, self.k, self.v, self.out, apart=self.config.keeps_q)
        return tiles, allocate(smem, self.transposed), barriers


def feed(load: Load, transpose: Transpose, arguments: tuple, warpgroup: Int32) -> None:
    """One warp loads, the others transpose."""
    launch, every, producers, ends = arguments
    load.run(launch, every.tiles, producers, warpgroup)
    transpose.run(launch, every, ends)
