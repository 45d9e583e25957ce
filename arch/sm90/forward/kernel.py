"""FlashAttention-3 forward (Shah et al. 2024, algorithms 1 and 2) for sm_90a.

    load      1 warpgroup      TMA: Q, then K[n] and V[n], latest first
    compute   1 to 3 of them   S = Q K, softmax, O += P V with wgmma; O by TMA

    load --q--> compute        1 stage: 64 rows for each compute warpgroup
    load --k--> compute        `stages` tiles; K and V apart, so that a product waits for its own tile only
    load --v--> compute

A tile is tile_m rows of a query head, or of several that share a KV head, with all keys or one split of them
(Dao et al. 2023, "Flash-Decoding"). A CTA takes one tile, or persists and takes every n-th: then a tile's
stores run under the next one's loads. Registers move from load to compute (setmaxnreg).
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ...common.channel import channel, channels_ready
from ...common.heads import parts_of
from ...common.job import Launch, rows_of_tile
from ...common.memory import Maps, SmemAllocator, Tiles
from ...common.operand import Operand
from ...common.roles import Role, warp_specialize
from ...common.schedule import InSections, WithoutDivisions, divisor, in_order
from ...common.sequence import extent
from ...elementwise import maximum, minimum
from ...problem import Operands, Problem
from ...scheduled import Schedule, without_schedule
from ..config import L2_FOR_SECTION, Config
from ..mma import ROWS
from .compute import Compute, ComputeEnds
from .load import Load, LoadEnds
from .topology import topology


class ForwardKernel:
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config, self.topology = problem, config, topology(config)
        precision, dim, dim_v = problem.precision, problem.head_dim, problem.head_dim_v
        ragged_k = problem.varlen or problem.seqused_k
        # A warpgroup's O takes the place of its own Q, unless another tile's Q is to come there meanwhile.
        pitch = 0 if config.persistent else ROWS * max(precision.padded(dim), precision.padded(dim_v))
        q = Operand.of(precision, ROWS, dim, config.consumers, problem.varlen, pitch)
        out = Operand.of(problem.out_precision, ROWS, dim_v, config.consumers, problem.varlen, pitch)
        self.q, self.out = q.packed(config.heads), out.packed(config.heads)
        k = Operand.of(precision, config.tile_n, dim, config.stages, ragged_k)
        v = Operand.of(precision, config.tile_n, dim_v, config.stages, ragged_k)
        self.k, self.v = k.in_pages(problem.page_size), v.in_pages(problem.page_size)

    def named(self, operands: list) -> Operands:
        """The operands of a launch, in their order, by their names."""
        return without_schedule(operands)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)
        multiprocessors, call = call.multiprocessors, call._replace(multiprocessors=None)
        group = call.q.shape[-2] // call.k.shape[-2]
        maps = self.maps(call, group)
        schedule = in_order(self.schedule(call, group), Schedule.of(self.problem, operands))
        grid = schedule.count
        if cutlass.const_expr(self.config.persistent):
            grid = minimum(grid, multiprocessors)
        threads = (self.config.threads, 1, 1)
        by_parts = divisor(parts_of(self.config.heads, group)) if self.problem.gqa else None
        self.kernel(Launch(call, maps, schedule, group, by_parts)).launch(
            grid=(grid, 1, 1), block=threads, stream=stream, min_blocks_per_mp=1
        )

    def schedule(self, call: Operands, group: Int32) -> WithoutDivisions:
        """The tiles in order; heads that share K and V are neighbours."""
        rows, batches = extent(call.q, call.cu_seqlens_q, call.max_seqlen_q)
        keys = call.k.shape[0] // maximum(batches, 1) if self.problem.packed_k else call.k.shape[1]
        group = parts_of(self.config.heads, group)
        heads = call.k.shape[-2] * group if self.config.heads > 1 else call.q.shape[-2]
        together = 1
        if self.config.longest_first:
            nbytes = self.problem.precision.nbytes(self.problem.head_dim + self.problem.head_dim_v)
            together = maximum(L2_FOR_SECTION // (nbytes * maximum(keys, 1)), 1) * group
            # Else, with very few keys, sizes would overflow.
            together = Int32(minimum(together, heads * batches))
        splits = Int32(call.out.shape[0]) if self.problem.split_kv else 1
        blocks = cute.ceil_div(rows, rows_of_tile(self.config))
        return WithoutDivisions.of(InSections(*map(Int32, (blocks, heads, batches)), splits, together))

    def maps(self, call: Operands, group: Int32) -> Maps:
        """The tensors as TMA sees them."""
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        return Maps(
            q=self.q.map(load, call.q, group),
            k=self.k.map(load, call.k),
            v=self.v.map(load, call.v),
            out=None if self.problem.split_kv else self.out.map(store, call.out, group),
        )

    @cute.kernel
    def kernel(self, launch: Launch):
        config, links = self.config, self.topology
        tiles, barriers = self.shared_memory()
        q = channel(barriers, links["q"], config.consumers * self.q.bytes)
        k = channel(barriers, links["k"], self.k.bytes)
        v = channel(barriers, links["v"], self.v.bytes)
        channels_ready()
        load = Load(self.problem, config, self.q, self.k, self.v)
        compute = Compute(self.problem, config, self.out)
        roles = (
            Role(
                partial(load.run, launch, tiles, LoadEnds(q.producer, k.producer, v.producer)),
                1,
                config.producer_registers,
            ),
            Role(
                partial(compute.run, launch, tiles, ComputeEnds(q.consumer, k.consumer, v.consumer)),
                config.consumers,
                config.consumer_registers,
            ),
        )
        warpgroup = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        warp_specialize(roles, config.launch_registers, warpgroup)

    def shared_memory(self) -> tuple[Tiles, cute.Pointer]:
        """The tiles, and the barriers of all channels."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        operands = self.q, self.k, self.v, self.out
        return Tiles.allocate(smem, *operands, apart=self.config.persistent), barriers
