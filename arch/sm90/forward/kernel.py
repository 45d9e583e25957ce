"""FlashAttention-3 forward (Shah et al. 2024, algorithms 1 and 2) for sm_90a.

    load      1 warpgroup      TMA: Q, then K[n] and V[n], latest first
    compute   2 or 3 of them   S = Q K, softmax, O += P V with wgmma; O by TMA

    load --q--> compute        1 stage: 64 rows for each compute warpgroup
    load --k--> compute        `stages` tiles; K and V apart, so that a product waits for its own tile only
    load --v--> compute

One CTA takes tile_m rows of one query head. Registers move from load to compute (setmaxnreg).
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ...common.channel import channel, channels_ready
from ...common.operand import Operand, padded
from ...common.roles import Role, warp_specialize
from ...common.schedule import OneTile
from ...common.sequence import sequence_of
from ...problem import Operands, Problem
from ..mma import ROWS
from ..tuning import Config
from .compute import Compute, ComputeEnds
from .job import Job, Maps, Tiles
from .load import Load, LoadEnds

DTYPES = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}


class ForwardKernel:
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config = problem, config
        operand = partial(Operand.of, DTYPES[problem.dtype])
        dim, dim_v = problem.head_dim, problem.head_dim_v
        ragged_k = problem.varlen or problem.seqused_k
        pitch = ROWS * max(padded(dim), padded(dim_v))  # a warpgroup's O takes the place of its own Q
        self.q = operand(ROWS, dim, config.consumers, problem.varlen, pitch)
        self.out = operand(ROWS, dim_v, config.consumers, problem.varlen, pitch)
        self.k = operand(config.tile_n, dim, config.stages, ragged_k)
        self.v = operand(config.tile_n, dim_v, config.stages, ragged_k)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = Operands(*operands)
        heads, kv_heads = call.q.shape[-2], call.k.shape[-2]
        if cutlass.const_expr(self.problem.varlen):
            rows, batches = call.max_seqlen_q, call.cu_seqlens_q.shape[0] - 1
        else:
            rows, batches = call.q.shape[1], call.q.shape[0]
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        maps = Maps(
            q=self.q.map(load, call.q),
            k=self.k.map(load, call.k),
            v=self.v.map(load, call.v),
            out=self.out.map(store, call.out),
        )
        schedule = OneTile(cute.ceil_div(rows, self.config.tile_m), heads, batches)
        threads = (self.config.threads, 1, 1)
        self.kernel(call, maps, schedule, heads // kv_heads).launch(
            grid=schedule.grid(), block=threads, stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, call: Operands, maps: Maps, schedule: OneTile, group: Int32):
        work = schedule.tile(cute.arch.block_idx()[0])
        sequence = sequence_of(call, work.batch)
        first_row = work.m_block * self.config.tile_m
        if first_row < sequence.q_rows:
            kv_head = work.head // group if cutlass.const_expr(self.problem.gqa) else work.head
            self.row_block(Job(call, maps, sequence, work.head, kv_head, first_row))

    @cute.jit
    def row_block(self, job: Job):
        config, readers = self.config, 4 * self.config.consumers
        tiles, barriers = self.shared_memory()
        q = channel(barriers, 1, config.consumers * self.q.bytes, readers)
        k = channel(barriers + 2, config.stages, self.k.bytes, readers)
        v = channel(barriers + 2 + 2 * config.stages, config.stages, self.v.bytes, readers)
        channels_ready()
        load = partial(Load(self.problem, config, self.q, self.k, self.v).run, job, tiles)
        compute = partial(Compute(self.problem, config, self.out).run, job, tiles)
        roles = (
            Role(partial(load, LoadEnds(q.fill, k.fill, v.fill)), 1, config.producer_registers),
            Role(
                partial(compute, ComputeEnds(q.read, k.read, v.read)),
                config.consumers,
                config.consumer_registers,
            ),
        )
        warpgroup = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        warp_specialize(roles, config.launch_registers, warpgroup)

    def shared_memory(self) -> tuple[Tiles, cute.Pointer]:
        """The tiles, and the barriers of all channels."""
        smem = cutlass.utils.SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, 2 + 4 * self.config.stages)

        def tensor(operand: Operand) -> cute.Tensor:
            shape, swizzle = operand.layout().outer, operand.layout().inner
            return smem.allocate_tensor(operand.dtype, shape, byte_alignment=1024, swizzle=swizzle)

        def in_place(tile: cute.Tensor, operand: Operand) -> cute.Tensor:
            pointer = cute.recast_ptr(tile.iterator, operand.layout().inner, operand.dtype)
            return cute.make_tensor(pointer, operand.layout().outer)

        larger = tensor(max(self.q, self.out, key=lambda operand: operand.bytes))
        q, out = in_place(larger, self.q), in_place(larger, self.out)
        return Tiles(q, tensor(self.k), tensor(self.v), out), barriers
