"""Latent attention (MLA, DeepSeek-V2 2024, section 2.1, absorbed) for sm_90a: V is K's first columns.

    load      1 warp           TMA: Q, then K[n], latest first
    compute   2 warpgroups     S = Q K and softmax in turn, O += P V for half of the columns each; wgmma

    load --q--> compute        64 rows for both warpgroups
    load --k--> compute        `stages` tiles, each in parts of 64 columns (parts.py)
    compute --freed--> load    places of parts, in three ranges of a tile
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from ...common.channel import channels_ready
from ...common.job import Launch
from ...common.memory import Maps, SmemAllocator, Tiles, allocate, in_place
from ...common.operand import Operand
from ...common.roles import Role, warp_specialize
from ...problem import Operands, Problem
from ..forward.kernel import ForwardKernel
from ..mma import ROWS
from .compute import HandOver, LatentCompute, LatentTiles
from .config import Config
from .load import Edges, LatentLoad
from .parts import Parts
from .topology import topology


class LatentKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config, self.topology = problem, config, topology(problem, config)
        precision, dim = problem.precision, problem.head_dim
        q = Operand.of(precision, ROWS, dim, 1, problem.varlen)
        out = Operand.of(problem.out_precision, ROWS, problem.head_dim_v, 1, problem.varlen)
        self.q, self.out = q.packed(config.heads), out.packed(config.heads)
        ragged, parts = problem.varlen or problem.seqused_k, Parts.of(problem).count
        k = Operand.of(precision, config.tile_n, dim, config.stages * parts, ragged).in_parts(parts)
        self.k = k.in_pages(problem.page_size)

    def maps(self, call: Operands, group: Int32) -> Maps:
        """V is K."""
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        k = self.k.map(load, call.k)
        out = None if self.problem.split_kv else self.out.map(store, call.out, group)
        return Maps(self.q.map(load, call.q, group), k, k, out)

    @cute.kernel
    def kernel(self, launch: Launch):
        config, links = self.config, self.topology
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        every = self.tiles(smem)
        edges = Edges.at(barriers, links)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            edges.make(links)
        channels_ready()
        load = LatentLoad(self.problem, config, self.q, self.k)
        compute = LatentCompute(self.problem, config, self.out)
        roles = (
            Role(partial(load.run, launch, every.tiles, edges), 1, config.producer_registers),
            Role(partial(compute.run, launch, every, edges), config.consumers, config.consumer_registers),
        )
        warpgroup = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        warp_specialize(roles, config.launch_registers, warpgroup)

    def tiles(self, smem: SmemAllocator) -> LatentTiles:
        """O comes in Q's place, and sums in P's, when both warpgroups are done with these."""
        rows, threads = self.config.tile_m, 128
        row_max = smem.allocate_tensor(Float32, cute.make_layout(rows), byte_alignment=128)
        q, k = allocate(smem, self.q), allocate(smem, self.k)
        p = Operand.of(self.problem.p_precision, rows, self.config.tile_n, 1, False)
        words = cute.make_layout((2, threads, p.bytes // (8 * threads)))
        sums = smem.allocate_tensor(Float32, words, byte_alignment=1024)
        handed = in_place(sums, p)[None, None, 0]
        tiles = Tiles(q, k, k, in_place(q, self.out))
        return LatentTiles(tiles, HandOver(handed, row_max, sums))
