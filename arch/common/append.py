"""The append kernel: rows of new keys and values into the cache, and rows of q into scratch, rotated.

Some neighbouring lanes of a warp take one row of one head, each 16 bytes of it: the new keys and values of a
sequence first, through their heads, then its queries, through theirs. A pair's product of two 16-bit numbers
is exact in fp32, so that a rotated number is rounded once to fp32, by its sum, and once to 16 bits.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from ..append import CHUNK, AppendConfig, AppendOperands, AppendProblem
from ..elementwise import where
from .element import element_type
from .rotary import turned_halves, turned_neighbours
from .rows import rows_of


class AppendKernel:
    """The kernel for one problem: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: AppendProblem, config: AppendConfig):
        self.problem, self.config = problem, config

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = AppendOperands(*operands)
        rows = call.k_new.shape[1] * call.k_new.shape[2]
        if const_expr(self.problem.rotary_dim > 0):
            longest = call.max_seqlen_q if self.problem.varlen else call.q.shape[1]
            rows += longest * call.q.shape[-2]
        blocks = cute.ceil_div(rows, self.config.rows)
        self.kernel(call, blocks).launch(
            grid=(blocks * call.k_new.shape[0], 1, 1), block=(32 * self.config.warps, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, call: AppendOperands, blocks: Int32):
        block, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        batch = Int32(Uint32(block) // Uint32(blocks))
        lane = thread % self.config.lanes
        row = (block - batch * blocks) * self.config.rows + thread // self.config.lanes
        _, new, heads, _ = call.k_new.shape
        if row == 0 and lane == 0:
            call.seqlens[batch] = call.cache_seqlens[batch] + new
        if row < new * heads:
            self.append(call, batch, row // heads, row % heads, lane)
        elif const_expr(self.problem.rotary_dim > 0):
            self.query(call, batch, row - new * heads, lane)

    @cute.jit
    def append(self, call: AppendOperands, batch: Int32, row: Int32, head: Int32, lane: Int32):
        """One new key and its value, one head of them."""
        place = self.place(call, batch, call.cache_seqlens[batch] + row)
        if lane * CHUNK < self.problem.head_dim:
            key = call.k_new[batch, row, head, None]
            self.store(call.k_cache[(*place, head, None)], lane, self.rotated(call, key, batch, row, lane))
        if lane * CHUNK < self.problem.head_dim_v:
            value = self.chunk(call.v_new[batch, row, head, None], lane)
            self.store(call.v_cache[(*place, head, None)], lane, value)

    @cute.jit
    def place(self, call: AppendOperands, batch: Int32, position: Int32):
        """Of a key of a sequence: (row of the cache, position), or (page, row of the page)."""
        if const_expr(self.problem.paged):
            page_size = call.k_cache.shape[1]
            page = position // page_size
            return call.block_table[batch, page], position - page * page_size
        if const_expr(self.problem.batch_idx):
            return call.cache_batch_idx[batch], position
        return batch, position

    @cute.jit
    def query(self, call: AppendOperands, batch: Int32, i: Int32, lane: Int32):
        """Number `i` of a sequence's rows of q, counted through the heads."""
        heads = call.q.shape[-2]
        rows = rows_of(call.cu_seqlens_q, call.q.shape[1], batch)
        row, head = i // heads, i % heads
        if row < rows.count and lane * CHUNK < self.problem.head_dim:
            step = row * call.query_step
            found = self.rotated(call, rows.of(call.q, head)[row, None], batch, step, lane)
            self.store(rows.of(call.q_rotated, head)[row, None], lane, found)

    @cute.jit
    def rotated(self, call: AppendOperands, source: cute.Tensor, batch: Int32, step: Int32, lane: Int32):
        """A lane's part of a row that stands `step` behind the position of the first new key."""
        mine = self.chunk(source, lane)
        if const_expr(self.problem.rotary_dim > 0):
            base = call.rotary_seqlens if self.problem.rotary_seqlens else call.cache_seqlens
            angles = [table[base[batch] + step, None] for table in (call.rotary_cos, call.rotary_sin)]
            if lane * CHUNK < self.problem.rotary_dim:
                if const_expr(self.problem.interleaved):
                    self.turn_neighbours(mine, angles, lane)
                else:
                    self.turn_halves(mine, source, angles, lane)
        return mine

    @cute.jit
    def turn_neighbours(self, mine: cute.Tensor, angles: list[cute.Tensor], lane: Int32):
        """Pairs (0, 1), (2, 3), … of what a lane has."""
        cos, sin = (self.chunk(table, lane, CHUNK // 2).load().to(Float32) for table in angles)
        x, turned = mine.load().to(Float32), cute.make_rmem_tensor(CHUNK, Float32)
        for i, number in enumerate(turned_neighbours(x, cos, sin, CHUNK // 2)):
            turned[i] = number
        mine.store(turned.load().to(mine.element_type))

    @cute.jit
    def turn_halves(self, mine: cute.Tensor, source: cute.Tensor, angles: list[cute.Tensor], lane: Int32):
        """Pairs (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), …: a lane looks up the others of its pairs."""
        half = self.problem.rotary_dim // 2 // CHUNK
        first = lane < half
        other = self.chunk(source, where(first, lane + half, lane - half)).load().to(Float32)
        cos, sin = (self.chunk(table, where(first, lane, lane - half)).load().to(Float32) for table in angles)
        x, turned = mine.load().to(Float32), cute.make_rmem_tensor(CHUNK, Float32)
        for i, number in enumerate(turned_halves(x, other, (cos, sin), first, CHUNK)):
            turned[i] = number
        mine.store(turned.load().to(mine.element_type))

    @cute.jit
    def chunk(self, row: cute.Tensor, index: Int32, size: cutlass.Constexpr[int] = CHUNK):
        """Part `index` of a row, in registers."""
        registers = cute.make_rmem_tensor(size, element_type(self.problem.precision))
        cute.autovec_copy(cute.local_tile(row, (size,), (index,)), registers)
        return registers

    @cute.jit
    def store(self, row: cute.Tensor, index: Int32, registers: cute.Tensor):
        cute.autovec_copy(registers, cute.local_tile(row, (CHUNK,), (index,)))
