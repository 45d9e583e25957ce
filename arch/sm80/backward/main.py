"""The main kernel of FlashAttention-2's backward pass (Dao 2023, algorithm 2) in sm_80 instructions.

One CTA keeps tile_n keys, K and V in shared memory, dK and dV in registers, and walks the query tiles of one
query head that see them:

    wait Q[i], dO[i]     S = Q K     P = exp(S - LSE)     dP = dO V     dS = P (dP - D)
    P, dS to shared      dV += P^T dO      dQ = dS K, added to its sum      dK += dS^T Q

Every warp takes part in every product, on another part of the tile each time: P and dS pass through shared
memory. Where query heads share K and V, dK and dV are added to sums as dQ is. What CTAs add to one sum comes
in any order, or in turns (turns.py).
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import LoadCacheMode, cpasync

from ...backward import BackwardOperands, BackwardProblem, scratch_columns
from ...common.blocks import Range, visits_from_keys
from ...common.dropout import Dropout
from ...common.element import element_type
from ...common.fragment import rows_by_columns
from ...common.keys import KeyTiles
from ...common.memory import SmemAllocator
from ...common.order import hidden_zero
from ...common.rows import scratch_row_k, scratch_row_q
from ...common.rules import Rules
from ...common.sequence import Sequence, sequence_of
from ...common.softmax import LOG2_E, exp2
from ...common.sums import SummedTile
from ...elementwise import where
from ...reverse import differentiated, seen_from_keys
from ..copy import TileCopy, tile_layout
from ..mma import PIECE, Pieces, product, rounded, tiled_mma
from .config import Config
from .grid import Grid, HeldPieces
from .job import KeyBlock, ProductOperands, QueryStream, Tiles, Walk
from .turns import AsTheyCome, InTurns

LARGE_SUM = 64  # numbers of dQ that a thread holds
STATISTICS = 4  # numbers of LSE or D that one copy brings


class BackwardKernel:
    """The kernel for one problem and config: compiled with `BackwardOperands` and a stream."""

    def __init__(self, problem: BackwardProblem, config: Config):
        mask = problem.forward.mask
        mask, score = mask and seen_from_keys(mask), problem.forward.score
        self.problem = replace(problem.forward, mask=mask, score=score and differentiated(score))
        self.config, self.dtype = config, element_type(self.problem.precision)
        dims = self.problem.head_dim, self.problem.head_dim_v
        self.dim, self.dim_v = map(scratch_columns, dims)
        early = config.tile_m * self.dim // config.threads >= LARGE_SUM
        tile = config.tile_m, config.tile_n
        self.turns = InTurns(tile, early) if problem.deterministic else AsTheyCome()
        self.copy_q, self.copy_k = (
            TileCopy(self.dtype, rows, self.problem.head_dim, self.dim, config.threads)
            for rows in (config.tile_m, config.tile_n)
        )
        self.copy_out, self.copy_v = (
            TileCopy(self.dtype, rows, self.problem.head_dim_v, self.dim_v, config.threads)
            for rows in (config.tile_m, config.tile_n)
        )

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = BackwardOperands(*operands)
        schedule = KeyTiles.of(call, self.config.tile_n)
        self.kernel(call, schedule).launch(
            grid=schedule.grid(), block=(self.config.threads, 1, 1), stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, call: BackwardOperands, schedule: KeyTiles):
        block = self.block_of(call, schedule, 0)
        if block.first_key < block.sequence.k_rows:
            self.key_block(block, schedule)

    def block_of(self, call: BackwardOperands, schedule: KeyTiles, zero: Int32 | int) -> KeyBlock:
        """What this CTA works on. zero: see `hidden_zero`."""
        tile = schedule.tile(cute.arch.block_idx()[0] + zero, self.config.tile_n, self.problem.gqa)
        sequence, thread = sequence_of(call, tile.batch), cute.arch.thread_idx()[0] + zero
        return KeyBlock(call, sequence, tile.head, tile.kv_head, tile.member, tile.first_key, thread)

    @cute.jit
    def key_block(self, block: KeyBlock, schedule: KeyTiles):
        tiles = self.tiles()
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        tile = self.config.tile_m, self.config.tile_n
        visits = visits_from_keys(self.problem, tile, block.call, rules, block.sequence, block.first_key)
        walk = self.walk(block, tiles, visits, rules)
        if visits.any():
            self.begin_keys(block, tiles)
            self.begin(walk.stream, visits.start, Boolean(True))
            self.hold(walk)
        phases = visits.phases
        for p in cutlass.range_constexpr(len(phases)):
            for i in cutlass.range(phases[p].visits, unroll=1):
                self.visit(walk, visits.nth(phases[p], i), phases[p].masked)
        # Found once more, so that no register holds through the products what only the end needs.
        block = self.block_of(block.call, schedule, hidden_zero(schedule.group))
        if const_expr(self.problem.gqa):
            row = self.scratch_k(block)
            self.turns.wait_k(block, row)
            if visits.any():
                self.add(walk, block, row)
            self.turns.pass_k(block, row)
        else:
            self.store(walk, block)

    def visit(self, walk: Walk, place: Int32, masked: bool) -> None:
        """The query tile at a place."""
        slot, following = self.slot(place), walk.stream.visits.after(place, 1)
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        # Places on the tile are found anew at every visit: no register holds them through the products.
        grid_s = walk.grid_s.of(walk.block.thread + hidden_zero(place))
        first_row = self.first_row(walk.stream, place)
        # Of one stage there is no product to form, which the compiler may pack with bytes it never wrote.
        stage = 0 if self.config.stages == 1 else slot
        sizes = (stage * self.tile_bytes(dim) for dim in (self.dim, self.dim_v))
        ops = walk.operands.at(hidden_zero(place), *sizes)
        acc_s = grid_s.accumulator()
        self.multiply(walk, acc_s, self.dim, grid_s, ops.q, walk.held_k or ops.k)
        s = rows_by_columns(acc_s)
        slopes = walk.rules.apply_with_slopes(
            s,
            lambda r: first_row + grid_s.row_of(r),
            lambda c: walk.block.first_key + grid_s.column_of(c),
            masked,
        )
        self.probabilities(s, grid_s.by_row(walk.tiles.lse, slot), walk.scale_log2)
        kept = self.kept(walk, s, grid_s, first_row)
        grid_s.store(rounded(acc_s if kept is None else kept, self.dtype), walk.tiles.p)
        acc_ds = grid_s.accumulator()
        self.multiply(walk, acc_ds, self.dim_v, grid_s, ops.grad_out, walk.held_v or ops.v)
        ds = rows_by_columns(acc_ds)
        if kept is not None:
            self.drop(ds, rows_by_columns(kept), walk.block.call.keep_scale)
        self.differentiate(ds, s, grid_s.by_row(walk.tiles.delta, slot), slopes)
        grid_s.store(rounded(acc_ds, self.dtype), walk.tiles.ds)
        if self.config.stages > 1:
            # Behind the products that need most registers, and ahead of three more that hide it.
            self.begin(walk.stream, following, walk.stream.visits.inside(following))
        cute.arch.barrier()
        self.multiply(walk, walk.acc_v, self.config.tile_m, walk.grid_v, ops.p_transposed, ops.grad_out_as_b)
        turn = self.turns.turn_q(walk, place)
        acc_q = walk.grid_q.accumulator()
        self.multiply(walk, acc_q, self.config.tile_n, walk.grid_q, ops.ds, ops.k_as_b)
        # Found anew, too: a register that held it from the scores to here is spilled with block masks.
        row = self.scratch_q(walk.block.sequence) + self.first_row(walk.stream, place)
        self.turns.wait_q(walk, place, row, turn)
        self.sums_q(walk, place, row).add(acc_q)
        self.multiply(walk, walk.acc_k, self.config.tile_m, walk.grid_k, ops.ds_transposed, ops.q_as_b)
        self.turns.pass_q(walk, place, row)
        if self.config.stages == 1:
            cute.arch.barrier()
            self.begin(walk.stream, following, walk.stream.visits.inside(following))

    def hold(self, walk: Walk) -> None:
        """Read K and V from shared memory, where the config has registers for them."""
        held = [pieces for pieces in (walk.held_k, walk.held_v) if pieces]
        if held:
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
        for pieces in held:
            pieces.load()

    def multiply(
        self, walk: Walk, acc: cute.Tensor, k: int, grid: Grid, a: Pieces, b: Pieces | HeldPieces
    ) -> None:
        """acc += A B over k."""
        product(walk.mma, acc, k // PIECE, grid.load_a(a), b)

    def tile_bytes(self, dim: int) -> int:
        """Of a tile of Q or dO."""
        return self.config.tile_m * dim * self.dtype.width // 8

    def probabilities(self, s: cute.Tensor, lse: list[Float32], scale_log2: Float32) -> None:
        """S becomes P in place."""
        for r in range(cute.size(s, mode=[0])):
            for c in range(cute.size(s, mode=[1])):
                s[r, c] = exp2(cute.math.fma(s[r, c], scale_log2, -lse[r]))

    def kept(self, walk: Walk, p: cute.Tensor, grid: Grid, first_row: Int32) -> cute.Tensor | None:
        """P as an accumulator with 0 where dropout removed it; None without dropout."""
        if walk.dropout is None:
            return None
        kept = grid.accumulator()
        some = rows_by_columns(kept)
        for r in range(cute.size(p, mode=[0])):
            for c in range(cute.size(p, mode=[1])):
                some[r, c] = p[r, c]
        first_key = walk.block.first_key + grid.first_column
        walk.dropout.apply(some, lambda r: first_row + grid.row_of(r), first_key, grid.thread)
        return kept

    def drop(self, dp: cute.Tensor, kept: cute.Tensor, keep_scale: Float32) -> None:
        """What dropout does to dP: 0 where it left 0 of P. Where P itself is 0, so is dS, whatever dP."""
        for r in range(cute.size(dp, mode=[0])):
            for c in range(cute.size(dp, mode=[1])):
                dp[r, c] = where(kept[r, c] == 0.0, 0.0, dp[r, c] * keep_scale)

    def differentiate(
        self, ds: cute.Tensor, p: cute.Tensor, delta: list[Float32], slopes: cute.Tensor | float
    ) -> None:
        """dP becomes dS = P * (dP - D) in place, times the slope of the score rule.

        A slope that is no number, of a pair that is hidden or has no weight, counts for nothing.
        """
        for r in range(cute.size(p, mode=[0])):
            for c in range(cute.size(p, mode=[1])):
                ds[r, c] = p[r, c] * (ds[r, c] - delta[r])
                if not isinstance(slopes, float):
                    ds[r, c] = where(p[r, c] == 0.0, 0.0, ds[r, c] * slopes[r, c])
                elif slopes != 1.0:
                    ds[r, c] = ds[r, c] * slopes

    def slot(self, place: Int32) -> Int32:
        """Which of the stages a visit's tiles are in."""
        return hidden_zero(place) if self.config.stages == 1 else place % self.config.stages

    def first_row(self, stream: QueryStream, place: Int32) -> Int32:
        """Of a visit's tile."""
        return stream.visits.block(place) * self.config.tile_m

    @cute.jit
    def begin(self, stream: cutlass.Constexpr, place: Int32, due: Boolean):
        """Begin copying a visit's Q, dO, LSE and D; an empty group where it is not due."""
        if due:
            # Found anew at every visit, so that no register holds them through the products.
            thread, head = (x + hidden_zero(place) for x in (stream.block.thread, stream.block.head))
            slot, first_row = self.slot(place), self.first_row(stream, place)
            sequence, call = stream.block.sequence, stream.block.call
            for copy, tensor, tile in (
                (self.copy_q, call.q, stream.tiles.q), (self.copy_out, call.grad_out, stream.tiles.grad_out)
            ):
                rows = cute.domain_offset((first_row, 0), sequence.q_rows_of(tensor, head))
                chunks = copy.partition(tile, thread)[None, None, None, slot]
                copy.load(rows, chunks, thread, sequence.seqlen_q - 1 - first_row)
            copies = self.config.tile_m // STATISTICS
            both = (call.lse_log2, stream.tiles.lse), (call.delta, stream.tiles.delta)
            for i, (numbers, tile) in enumerate(both):
                if thread // copies == i:
                    first = self.scratch_q(sequence) + first_row
                    self.begin_numbers(numbers[head, None], first, tile[None, slot], thread % copies)
        cute.arch.cp_async_commit_group()

    def begin_numbers(self, numbers: cute.Tensor, first: Int32, tile: cute.Tensor, which: Int32) -> None:
        """Begin copying a thread's part of LSE or D of a tile's rows, from scratch row `first` on."""
        op = cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL)
        atom = cute.make_copy_atom(op, Float32, num_bits_per_copy=32 * STATISTICS)
        rows = cute.domain_offset((cute.assume(first, divby=STATISTICS),), numbers)
        source, target = (cute.local_tile(part, (STATISTICS,), (which,)) for part in (rows, tile))
        cute.copy(atom, source, target)

    def begin_keys(self, block: KeyBlock, tiles: Tiles) -> None:
        """Begin copying K and V, part of the first visit's group, and clear what no copy writes."""
        sequence, thread = block.sequence, block.thread
        self.copy_q.clear_padding(self.copy_q.partition(tiles.q, thread), thread)
        self.copy_out.clear_padding(self.copy_out.partition(tiles.grad_out, thread), thread)
        last_row = sequence.seqlen_k - 1 - block.first_key
        for copy, tensor, tile in (
            (self.copy_k, block.call.k, tiles.k), (self.copy_v, block.call.v, tiles.v)
        ):
            rows = cute.domain_offset((block.first_key, 0), sequence.k_rows_of(tensor, block.kv_head))
            chunks = copy.partition(tile, thread)
            copy.clear_padding(chunks, thread)
            copy.load(rows, chunks[None, None, None, 0], thread, last_row)

    @cute.jit
    def store(self, walk: cutlass.Constexpr, block: KeyBlock):
        """dK and dV by way of K's and V's places, so that whole lines leave."""
        tiles = walk.tiles
        scale = Float32(block.call.softmax_scale)
        for i in cutlass.range_constexpr(cute.size(walk.acc_k)):
            walk.acc_k[i] = walk.acc_k[i] * scale
        if const_expr(self.problem.dropout):
            for i in cutlass.range_constexpr(cute.size(walk.acc_v)):
                walk.acc_v[i] = walk.acc_v[i] * block.call.keep_scale
        if const_expr(self.config.stages > 1):  # a visit with one stage ends with a barrier
            cute.arch.barrier()
        walk.grid_k.of(block.thread).store(rounded(walk.acc_k, self.dtype), tiles.k)
        walk.grid_v.of(block.thread).store(rounded(walk.acc_v, self.dtype), tiles.v)
        cute.arch.barrier()
        for copy, tile, tensor in (
            (self.copy_k, tiles.k, block.call.grad_k), (self.copy_v, tiles.v, block.call.grad_v)
        ):
            rows = cute.domain_offset((block.first_key, 0), block.sequence.k_rows_of(tensor, block.kv_head))
            chunks = copy.partition(tile, block.thread)[None, None, None, 0]
            copy.store(chunks, rows, block.thread, block.sequence.k_rows - block.first_key)

    def add(self, walk: Walk, block: KeyBlock, row: Int32) -> None:
        """dK and dV to the sums over the query heads that share them, from scratch row `row` on."""
        for sums, acc in ((block.call.grad_k_sum, walk.acc_k), (block.call.grad_v_sum, walk.acc_v)):
            SummedTile.of(sums, block.kv_head, row, block.thread, self.config.threads).add(acc)

    def scratch_q(self, sequence: Sequence) -> Int32:
        """The sequence's first scratch row on the query side."""
        return scratch_row_q(self.problem, sequence)

    def scratch_k(self, block: KeyBlock) -> Int32:
        """The keys' first scratch row."""
        return scratch_row_k(self.problem, block.sequence) + block.first_key

    def sums_q(self, walk: Walk, place: Int32, row: Int32) -> SummedTile:
        """Where a visit's dQ is added, from scratch row `row` on."""
        block, zero = walk.block, hidden_zero(place)
        return SummedTile.of(block.call.grad_q_sum, block.head, row, block.thread + zero, self.config.threads)

    def tiles(self) -> Tiles:
        config, smem = self.config, SmemAllocator()

        def tile(rows: int, dim: int, stages: int = 1) -> cute.Tensor:
            return smem.allocate_tensor(self.dtype, tile_layout(rows, dim, stages), byte_alignment=128)

        def numbers() -> cute.Tensor:
            layout = cute.make_layout((config.tile_m, config.stages))
            return smem.allocate_tensor(Float32, layout, byte_alignment=16)

        return Tiles(
            k=tile(config.tile_n, self.dim),
            v=tile(config.tile_n, self.dim_v),
            q=tile(config.tile_m, self.dim, config.stages),
            grad_out=tile(config.tile_m, self.dim_v, config.stages),
            p=tile(config.tile_m, config.tile_n),
            ds=tile(config.tile_m, config.tile_n),
            lse=numbers(),
            delta=numbers(),
        )

    def walk(self, block: KeyBlock, tiles: Tiles, visits: Range, rules: Rules) -> Walk:
        config, thread = self.config, block.thread
        grid_s = Grid(*config.grid_s, config.tile_m, config.tile_n, thread, joined=True)
        grid_k = Grid(*config.grid_k(self.dim), config.tile_n, self.dim, thread)
        grid_v = Grid(*config.grid_k(self.dim_v), config.tile_n, self.dim_v, thread)
        grid_q = Grid(*config.grid_q(self.dim), config.tile_m, self.dim, thread)
        scale = Float32(1.0) if self.problem.score else Float32(block.call.softmax_scale)
        operands = self.operands(tiles, grid_s, grid_k, grid_v, grid_q)
        return Walk(
            problem=self.problem,
            mma=tiled_mma(self.dtype, config.warps),
            block=block,
            tiles=tiles,
            stream=QueryStream(block, tiles, visits),
            rules=rules,
            dropout=Dropout.of(self.problem, block.call, block.sequence, block.head),
            grid_s=grid_s,
            grid_k=grid_k,
            grid_v=grid_v,
            grid_q=grid_q,
            operands=operands,
            scale_log2=scale * LOG2_E,
            acc_k=grid_k.accumulator(),
            acc_v=grid_v.accumulator(),
            held_k=grid_s.hold_b(operands.k) if config.k_in_registers else None,
            held_v=grid_s.hold_b(operands.v) if config.v_in_registers else None,
        )

    def operands(self, tiles: Tiles, s: Grid, k: Grid, v: Grid, q: Grid) -> ProductOperands:
        """The tiles as operands; those of one shape share their addresses but for the distance."""
        same = self.dim == self.dim_v
        q_as_a, k_as_b, q_as_b = s.a(tiles.q), s.b(tiles.k), k.b_transposed(tiles.q)
        p_transposed = v.a_transposed(tiles.p)
        return ProductOperands(
            q=q_as_a,
            k=k_as_b,
            grad_out=q_as_a.shifted(distance(tiles.q, tiles.grad_out)) if same else s.a(tiles.grad_out),
            v=k_as_b.shifted(distance(tiles.k, tiles.v)) if same else s.b(tiles.v),
            p_transposed=p_transposed,
            grad_out_as_b=q_as_b.shifted(distance(tiles.q, tiles.grad_out)) if same
            else v.b_transposed(tiles.grad_out),
            ds=q.a(tiles.ds),
            k_as_b=q.b_transposed(tiles.k),
            ds_transposed=p_transposed.shifted(distance(tiles.p, tiles.ds)) if k.rows == v.rows
            else k.a_transposed(tiles.ds),
            q_as_b=q_as_b,
        )


def distance(tile: cute.Tensor, other: cute.Tensor) -> Int32:
    """Bytes from one shared tile to another."""
    return other.iterator.toint().to(Int32) - tile.iterator.toint().to(Int32)
