"""FlashAttention-2 forward (Dao 2023, algorithm 1) in sm_80 instructions.

One CTA takes tile_m rows of one query head, or of several that share a KV head, and walks the KV blocks that
they may see, or one split of them (Dao et al. 2023, "Flash-Decoding"):

    wait K[n]    begin V ahead    S = Q K[n]    P, rescale = softmax(S)
    wait V[n]    begin K ahead    O = rescale O + P V[n]

A wait shows one tile to all warps and frees the slot of the other kind that the block before used.
Each warp works on its own rows from beginning to end: two row blocks of 16 where registers allow, so
that every piece of K and V that it reads from shared memory is multiplied twice. Where O is too wide for a
warp's registers, warps abreast share out its columns.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ..common.blocks import Listed, Range
from ..common.columns import Keys
from ..common.dropout import Dropout
from ..common.element import element_type
from ..common.fragment import as_operand_a, rows_by_columns
from ..common.heads import TileHeads, parts_of, row_of
from ..common.job import rows_of_tile, visits_of
from ..common.memory import SmemAllocator
from ..common.order import hidden_zero, unknown
from ..common.rules import Rules
from ..common.schedule import InOrder, InSections, OneTile, in_order, tile_per_cta
from ..common.sequence import cached_sequence_of, extent
from ..common.softmax import LOG2_E, OnlineSoftmax, is_large
from ..problem import Operands, Problem
from ..scheduled import Schedule, without_schedule
from .config import Config
from .copy import TileCopy, tile_layout
from .job import RowBlock, Tiles, Walk, rows_of_tile_in
from .kv import KvLoader, KvStream, LatentLoader, Source
from .mma import PIECE, Pieces, product, rounded, tiled_mma
from .rows import keys_of
from .store import Partial, Result

ROW_LANES = (1, 2)  # mma.sync spreads a row of the accumulator over 4 neighbouring lanes


class ForwardKernel:
    """The kernel for one problem and config: compiled with operands in `Operands` order and a stream."""

    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config = problem, config
        precision, dim, dim_v = problem.precision, problem.head_dim, problem.head_dim_v
        self.dtype, self.out_dtype = element_type(precision), element_type(problem.out_precision)
        self.dim, self.dim_v = precision.padded(dim), config.columns(problem)
        self.latent = problem.cache is not None and problem.cache.latent
        self.copy_q = TileCopy(self.dtype, config.tile_m, dim, self.dim, config.threads, config.heads)
        copy_k = TileCopy(self.dtype, config.tile_n, dim, self.dim, config.threads)
        copy_v = TileCopy(self.dtype, config.tile_n, dim_v, self.dim_v, config.threads)
        copy_out = TileCopy(self.out_dtype, config.tile_m, dim_v, self.dim_v, config.threads, config.heads)
        self.store = Partial(problem, config) if problem.split_kv else Result(problem, config, copy_out)
        self.row_blocks = config.tile_m // (PIECE * config.warps)
        self.kv = (LatentLoader if self.latent else KvLoader)(copy_k, copy_v, config.tile_n, config.stages)

    def named(self, operands: list) -> Operands:
        """The operands of a launch, in their order, by their names."""
        return without_schedule(operands)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)._replace(multiprocessors=None)
        heads, kv_heads = call.q.shape[-2], call.k.shape[-2]
        rows, batches = extent(call.q, call.cu_seqlens_q, call.max_seqlen_q)
        splits = call.out.shape[0] if const_expr(self.problem.split_kv) else None
        group = heads // kv_heads
        if const_expr(self.config.heads > 1):
            heads = kv_heads * parts_of(self.config.heads, group)
        schedule = tile_per_cta(cute.ceil_div(rows, rows_of_tile(self.config)), heads, batches, splits)
        schedule = in_order(schedule, Schedule.of(self.problem, operands))
        kernel = self.kernel(call, schedule, group)
        threads = (self.config.threads, 1, 1)
        kernel.launch(
            grid=schedule.grid(),
            block=threads,
            stream=stream,
            min_blocks_per_mp=self.config.kept_resident(self.problem),
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, call: Operands, schedule: OneTile | InSections | InOrder, group_size: Int32):
        self.work(call, schedule, group_size)

    @cute.jit
    def work(self, call, schedule: OneTile | InSections | InOrder, group_size: Int32):
        """What a CTA does. call: Operands, or those of a kernel that has more."""
        m_block, head, batch, split = schedule.tile(cute.arch.block_idx()[0])
        splits = schedule.splits_of(batch)
        sequence = cached_sequence_of(call, batch)
        heads = TileHeads.of(self.problem, self.config.heads, head, group_size)
        first_row = m_block * rows_of_tile(self.config)
        if first_row < sequence.q_rows:
            thread = cute.arch.thread_idx()[0]
            mine = heads.of_row(self.config.heads, thread % 32 // 4)
            self.row_block(RowBlock(call, sequence, heads, mine, first_row, split, splits, thread))

    @cute.jit
    def row_block(self, block: RowBlock):
        tiles = self.tiles()
        head = block.heads.known(self.config.heads, block.head)
        rules = Rules.of(self.problem, block.call, block.sequence, head)
        visits = visits_of(self.problem, self.config, block, rules)
        stream = self.stream(block, tiles, visits)
        walk = self.walk(block, tiles, stream, rules)
        if visits.any():
            self.begin_q(block, tiles)
            self.kv.begin(stream)
            self.keep_q(walk)
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            for i in cutlass.range(phases[p].visits, unroll=1):
                self.visit(walk, visits.nth(phases[p], i), phases[p].masked)
        o, row_of, column_of = self.elements(walk.mma_o, block, block.thread, walk.acc_o)
        self.store.tile(walk, tiles, o, row_of, column_of)

    def visit(self, walk: Walk, place: Int32, masked: bool) -> None:
        """The KV block at a place: S = Q K^T, P = exp(rules(S) - max), O = rescale O + P V."""
        slot, first_key = self.kv.slot(place), walk.stream.visits.block(place) * self.config.tile_n
        self.kv.wait_k(walk.stream, place)
        self.kv.begin_v(walk.stream, place)
        acc_s = self.accumulator(walk.mma, self.config.tile_n)
        product(walk.mma, acc_s, self.dim // PIECE, self.q_operand(walk, place), walk.k.at(slot))
        s, row_of, column_of = self.elements(walk.mma, walk.block, walk.row_thread, acc_s)
        walk.rules.apply(s, row_of, Keys(first_key + column_of(0), in_pairs=True), masked)
        rescale, shifts = walk.softmax.raise_max(s), walk.softmax.shifts()
        self.settle(walk.softmax, s, walk.acc_o, rescale, shifts)
        walk.softmax.exponentials(s, rescale, shifts)
        if walk.dropout is not None:
            walk.dropout.apply(s, row_of, first_key, walk.block.thread)
        p = as_operand_a(rounded(acc_s, self.dtype))
        self.kv.wait_v(walk.stream, place)
        self.kv.begin_k(walk.stream, place)
        steps = self.config.tile_n // PIECE
        product(walk.mma_o, walk.acc_o, steps, lambda k: p[None, None, k], walk.v.at(slot))

    @cute.jit
    def settle(
        self,
        softmax: OnlineSoftmax,
        s: cute.Tensor,
        acc_o: cute.Tensor,
        factors: cute.Tensor,
        shifts: cute.Tensor,
    ):
        """O *= factors, row by row, and S lowered where it is large, unless no row of the warp needs either.

        Besides, the branch keeps the two products apart for the register allocator: scheduled as one
        block, they spill.
        """
        due = (factors[0] != 1.0) | is_large(shifts[0])
        for r in cutlass.range_constexpr(1, cute.size(factors)):
            due = due | (factors[r] != 1.0) | is_large(shifts[r])
        for _ in cutlass.range(unknown(Int32(cute.arch.vote_any_sync(due))), unroll=1):
            o = rows_by_columns(acc_o)
            for r in cutlass.range_constexpr(cute.size(factors)):
                for c in cutlass.range_constexpr(cute.size(o, mode=[1])):
                    o[r, c] = o[r, c] * factors[r]
            softmax.lower(s, shifts)

    def accumulator(self, mma: cute.TiledMma, columns: int) -> cute.Tensor:
        """fp32 zeros (mma, M, columns / 8) for tile_m rows."""
        acc = cute.make_rmem_tensor(mma.partition_shape_C((self.config.tile_m, columns)), Float32)
        acc.fill(0.0)
        return acc

    def elements(
        self, mma: cute.TiledMma, block: RowBlock, thread: Int32, acc: cute.Tensor
    ) -> tuple[cute.Tensor, Callable, Callable]:
        """What `thread` of `mma` has of an accumulator, as rows × columns; each row's index in the sequence,
        each column's in the tile.
        """
        columns = 8 * cute.size(acc, mode=[2]) * (mma.size // self.config.row_threads)
        tile = cute.make_identity_tensor((self.config.tile_m, columns))
        at = rows_by_columns(mma.get_slice(thread).partition_C(tile))
        return rows_by_columns(acc), lambda r: self.row_of(block, at[r, 0][0]), lambda c: at[0, c][1]

    def row_of(self, block: RowBlock, row: Int32) -> Int32:
        """In the sequence: a row of the tile."""
        heads = self.config.heads
        return block.first_row + row if heads == 1 else row_of(heads, block.first_row, row)

    def q_registers(self) -> list[cute.Tensor]:
        """Room for all of Q's operands, one per k step, where the config keeps them."""
        steps = self.dim // PIECE if self.config.q_in_registers else 0
        return [cute.make_rmem_tensor(((2, 2, 2), self.row_blocks), self.dtype) for _ in range(steps)]

    def keep_q(self, walk: Walk) -> None:
        """Read Q from shared memory once, where the config has registers for it."""
        if self.config.q_in_registers:
            cute.arch.cp_async_wait_group(self.kv.groups_begun)
            cute.arch.barrier()
            for k, registers in enumerate(walk.q_registers):
                walk.q.operand_a(k, registers, self.config.warps)

    def q_operand(self, walk: Walk, place: Int32) -> Callable:
        """k -> Q's registers for that k step: kept, or read again from shared memory."""
        if self.config.q_in_registers:
            return lambda k: walk.q_registers[k]
        q = walk.q.at(hidden_zero(place))
        registers = cute.make_rmem_tensor(((2, 2, 2), self.row_blocks), self.dtype)
        return lambda k: q.operand_a(k, registers, self.config.warps)

    def tiles(self) -> Tiles:
        config, smem = self.config, SmemAllocator()
        wider = tile_layout(config.tile_m, max(self.dim, self.dim_v), 1)
        q_or_out = smem.allocate_tensor(self.dtype, wider, byte_alignment=128).iterator
        k_layout = tile_layout(config.tile_n, self.dim, config.stages)
        v_layout = tile_layout(config.tile_n, self.dim_v, config.stages)
        out = cute.recast_ptr(q_or_out, dtype=self.out_dtype)
        k = smem.allocate_tensor(self.dtype, k_layout, byte_alignment=128)
        return Tiles(
            q=cute.make_tensor(q_or_out, tile_layout(config.tile_m, self.dim, 1)),
            k=k,
            v=k if self.latent else smem.allocate_tensor(self.dtype, v_layout, byte_alignment=128),
            out=cute.make_tensor(out, tile_layout(config.tile_m, self.dim_v, 1)),
        )

    def stream(self, block: RowBlock, tiles: Tiles, visits: Range | Listed) -> KvStream:
        call, sequence = block.call, block.sequence
        k_rows, v_rows = (keys_of(self.problem, call, sequence, t, block.heads.kv) for t in (call.k, call.v))
        k = Source(k_rows, self.kv.copy_k.partition(tiles.k, block.thread))
        return KvStream(
            k=k,
            v=None if self.latent else Source(v_rows, self.kv.copy_v.partition(tiles.v, block.thread)),
            visits=visits,
            seqlen_k=sequence.seqlen_k,
            thread=block.thread,
        )

    def begin_q(self, block: RowBlock, tiles: Tiles) -> None:
        """Start copying the rows of Q; the first group."""
        rows = rows_of_tile_in(self.config, block, block.call.q, block.sequence.seqlen_q)
        chunks = self.copy_q.partition(tiles.q, block.thread)
        self.copy_q.clear_padding(chunks, block.thread)
        last_row = block.sequence.seqlen_q - 1 - block.first_row
        self.copy_q.load(rows, chunks[None, None, None, 0], block.thread, last_row)
        cute.arch.cp_async_commit_group()

    def walk(self, block: RowBlock, tiles: Tiles, stream: KvStream, rules: Rules) -> Walk:
        call, thread = block.call, block.thread
        head = block.heads.known(self.config.heads, block.head)
        abreast, row_thread, column = self.config.abreast, thread, 0
        if abreast > 1:
            row_thread, column = thread % self.config.row_threads, thread // self.config.row_threads
        mma_o = tiled_mma(self.dtype, self.config.warps, abreast)
        acc_o = self.accumulator(mma_o, self.dim_v)
        # A score rule takes scaled scores, so that only the change of base is left to the softmax.
        scale = 1.0 if self.problem.score else call.softmax_scale
        rows = cute.size(rows_by_columns(acc_o), mode=[0])
        return Walk(
            mma=tiled_mma(self.dtype, self.config.warps),
            mma_o=mma_o,
            row_thread=row_thread,
            block=block,
            stream=stream,
            rules=rules,
            dropout=Dropout.of(self.problem, call, block.sequence, head),
            q=Pieces.a(tiles.q, row_thread),
            q_registers=self.q_registers(),
            k=Pieces.b(tiles.k, thread),
            v=Pieces.b_transposed(tiles.v, thread, column, abreast),
            acc_o=acc_o,
            softmax=OnlineSoftmax.create(rows, Float32(scale * LOG2_E), ROW_LANES),
        )
