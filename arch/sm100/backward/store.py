"""What leaves: dQ of every visit by the store role, dK and dV in the end by the warpgroups that computed.

Sums are added to by bulk reductions, `chunk` columns of a tile at a time, in the order of `common.sums` for
two threads per row: a tile is rows * columns neighbouring numbers, columns in order.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm

from ...backward import scratch_columns
from ...common.blocks import Listed, Range
from ...common.element import element_type
from ...common.key_block import KeyBlock, Launch
from ...common.rules import Rules
from ...problem import Problem
from ..group import Group
from ..tmem import columns, load, registers, some_columns
from .config import CHUNK, THREADS, Config
from .job import Edges, GradientOperands, Memory, key_block
from .plan import Plan
from .threads import threads_of
from .turns import AsTheyCome, InTurns

STORE, RESULT = 1, 2  # named barriers: of the store role, and the first of the compute warpgroups'


class Visit(NamedTuple):
    """A query tile, whose first scratch row is `row`. warp: of the store role."""

    block: KeyBlock
    rules: Rules
    visits: Range | Listed
    place: Int32
    row: Int32
    warp: Int32


class Store:
    """A warpgroup; each thread has a row of dQ, or two share one, half of its columns each. turns: whose."""

    def __init__(
        self, problem: Problem, config: Config, plan: Plan, turns: AsTheyCome | InTurns, group: Group
    ):
        self.problem, self.config, self.plan, self.turns, self.group = problem, config, plan, turns, group
        self.threads = threads_of(plan.grad_q_shape(0)[0], group)

    @cute.jit
    def run(self, launch: Launch, memory: Memory, edges: Edges, warp: Int32):
        memory, block = memory.looked_up(), key_block(self.problem, self.config, launch)
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        first_row = block.scratch_q(self.problem)
        for turn in cutlass.range(visits.total, unroll=1):
            place = visits.after(visits.start, turn)
            row = first_row + Int32(visits.block(place)) * self.config.tile_m
            row += block.rank * self.config.cta_rows
            visit = Visit(block, rules, visits, place, row, warp)
            self.tile(visit, memory, edges, turn)
            if warp == 0:
                self.finish(block, row, cute.arch.thread_idx()[0] % THREADS)
        if cute.arch.thread_idx()[0] % THREADS == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def tile(self, visit: Visit, memory: Memory, edges: Edges, turn: Int32) -> None:
        """All of a tile's dQ, filling by filling."""
        for filling in range(self.plan.fillings):
            self.leave(visit, memory, edges, turn * self.plan.fillings + filling, filling)

    @cute.jit
    def leave(
        self, visit: Visit, memory: Memory, edges: Edges, turn: Int32, filling: cutlass.Constexpr
    ):
        """A filling of dQ leaves tensor memory, all of it at once or piece by piece. turn: of fillings."""
        thread, width, config = cute.arch.thread_idx()[0] % THREADS, self.config.chunk, self.config
        chunks = self.plan.width(filling) // width
        together = chunks if config.at_once else 1
        edges.grad_q.wait_full(turn)
        for chunk in cutlass.range_constexpr(0, chunks, together):
            values = registers(together * width)
            first = self.plan.at("grad_q") + chunk * width
            load(columns(memory.tensor, first, together * width), values, thread)
            if cutlass.const_expr(chunk + together == chunks):
                edges.grad_q.warp_emptied(self.group)
            for c in cutlass.range_constexpr(together):
                place = turn * chunks + chunk + c
                self.stage(visit, memory, some_columns(values, c * width, width), place, (filling, chunk + c))

    def stage(
        self, visit: Visit, memory: Memory, values: cute.Tensor, place: Int32, piece: tuple[int, int]
    ) -> None:
        """A chunk of columns by way of shared memory to its sums. piece: filling, and chunk in it."""
        thread, config = cute.arch.thread_idx()[0] % THREADS, self.config
        staged = memory.tiles.sums[None, place % config.sums]
        self.meet(thread, config.sums - 1)
        row, side = self.threads.key(thread), self.threads.part(thread, config.chunk * config.cta_rows)
        to_sums(values, staged, config.cta_rows, row, side)
        cute.arch.barrier(barrier_id=STORE, number_of_threads=THREADS)
        self.add(visit, staged, *piece, thread)

    @cute.jit
    def add(
        self, visit: Visit, staged: cute.Tensor, filling: cutlass.Constexpr, chunk: cutlass.Constexpr,
        thread: Int32,
    ):
        """Begin adding a chunk of either side's columns, when it is the CTA's turn to add to the tile."""
        if visit.warp == 0:
            if cutlass.const_expr(filling == chunk == 0):
                self.turns.wait_q(visit.block, visit.rules, visit.visits, visit.place, visit.row)
            if thread == 0:
                sums = visit.block.call.grad_q_sum[visit.block.head, visit.row, None].iterator
                rows, width, sides = self.config.cta_rows, self.config.chunk, self.plan.sides
                for side in cutlass.range_constexpr(sides):
                    column = self.plan.column(filling, side) + chunk * width
                    add(sums + column * rows, staged.iterator + side * width * rows, width * rows)
                cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def meet(self, thread: Int32, pending: cutlass.Constexpr):
        """All threads, when at most `pending` additions still read shared memory."""
        if thread == 0:
            cute.arch.cp_async_bulk_wait_group(pending, read=True)
        cute.arch.barrier(barrier_id=STORE, number_of_threads=THREADS)

    @cute.jit
    def finish(self, block: KeyBlock, row: Int32, thread: Int32):
        """A tile's additions are begun; in turns, they are complete."""
        if cutlass.const_expr(self.turns.ordered):
            if thread == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=False)
            self.turns.pass_q(block, row)


def to_sums(
    values: cute.Tensor, staged: cute.Tensor, rows: int, row: Int32, first: Int32 | int = 0
) -> None:
    """Neighbouring columns of one of a tile's rows to where they lie among its numbers, from `first` on.

    They lie as accumulators of mma.sync do: a lane has of every 8 columns the pair that begins at twice its
    number % 4, in rows number // 4 and 8 more of its warp's 16. So four numbers of a row, two columns apart,
    are neighbours. Bulk copies may read them when all have met behind it.
    """
    first += row // 16 * 32 + row % 8 * 4
    below = row // 8 % 2
    for octet in range(cute.size(values) // 8):
        for odd in range(2):
            four = cute.make_rmem_tensor(4, Float32)
            for i in range(4):
                four[i] = values[0, octet * 8 + 2 * i + odd]
            place = (octet * 4 + below * 2 + odd) * (2 * rows) + first
            cute.autovec_copy(four, cute.local_tile(staged, (4,), (place // 4,)))
    cute.arch.fence_proxy("async.shared", space="cta")


def add(sums: cute.Pointer, staged: cute.Pointer, count: int) -> None:
    """Begin adding so many numbers in shared memory to sums in global memory."""
    operands = [sums.toint().ir_value(), staged.toint().to(Int32).ir_value(), Int32(4 * count).ir_value()]
    instruction = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], $2;"
    llvm.inline_asm(None, operands, instruction, "l,r,r", has_side_effects=True)


class Result:
    """dK and dV of the CTA's keys, a warpgroup each: rows of the gradients, by way of shared memory and TMA.

    Where query heads share keys they are added to sums instead, as dQ is.
    """

    def __init__(
        self, problem: Problem, config: Config, plan: Plan, operands: GradientOperands,
        turns: AsTheyCome | InTurns, group: Group,
    ):
        self.problem, self.config, self.plan, self.operands = problem, config, plan, operands
        self.turns, self.dtype = turns, element_type(problem.precision)
        self.threads = threads_of(plan.keys, group)

    @cute.jit
    def store(self, block: KeyBlock, memory: Memory, visits: cutlass.Constexpr, warpgroup: Int32):
        """When all products are complete: their operands' places in shared memory are free."""
        if cutlass.const_expr(self.config.paired):
            if block.first_key < block.sequence.k_rows:
                self.either(block, memory, visits, warpgroup)
        else:
            self.either(block, memory, visits, warpgroup)

    @cute.jit
    def either(self, block: KeyBlock, memory: Memory, visits: cutlass.Constexpr, warpgroup: Int32):
        """dK or dV, by the warpgroup."""
        if warpgroup == 0:
            self.of("grad_k", block, memory, visits)
        else:
            self.of("grad_v", block, memory, visits)

    def of(self, name: str, block: KeyBlock, memory: Memory, visits: Range | Listed) -> None:
        """dK or dV."""
        if self.problem.gqa:
            self.add(name, block, memory, visits)
        else:
            self.write(name, block, memory, visits)

    @cute.jit
    def add(self, name: cutlass.Constexpr, block: KeyBlock, memory: Memory, visits: cutlass.Constexpr):
        """To the sums."""
        thread, part = cute.arch.thread_idx()[0] % THREADS, int(name == "grad_v")
        row, staged = block.scratch_k(self.problem), memory.tiles.shared_sums[None, part]
        total = getattr(block.call, f"{name}_sum")
        warp = thread // 32
        if warp == 0:
            self.turns.wait_k(block, row, part)
        if visits.any():
            sums = total[block.kv_head, row, None].iterator
            keys, width = self.config.cta_keys, self.config.chunk
            own = width // self.plan.sharers
            for place, apart in self.threads.pieces(self.dim(name), width):
                values = registers(own)
                self.load(name, memory, place, width, values, thread)
                if thread == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                self.meet(part)
                to_sums(values, staged, keys, self.threads.key(thread), self.threads.part(thread, own * keys))
                self.meet(part)
                if thread == 0:
                    count = own if apart > own else width  # of columns that are neighbours
                    for first in range(0, width, count):
                        column = place + first // own * apart
                        add(sums + column * keys, staged.iterator + first * keys, count * keys)
                    cute.arch.cp_async_bulk_commit_group()
            if thread == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=not self.turns.ordered)
        if warp == 0:
            self.turns.pass_k(block, row, part)

    @cute.jit
    def write(self, name: cutlass.Constexpr, block: KeyBlock, memory: Memory, visits: cutlass.Constexpr):
        """To the rows of the gradient: zeros where nobody sees the keys."""
        thread, part = cute.arch.thread_idx()[0] % THREADS, int(name == "grad_v")
        tile = getattr(memory.tiles.moved, name)[None, None, 0]
        factor = self.factor(name, block)
        key, own = self.threads.key(thread), CHUNK // self.plan.sharers
        for place, apart in self.threads.pieces(self.dim(name), CHUNK):
            values = registers(own)
            values.fill(0.0)
            if visits.any():
                self.load(name, memory, place, CHUNK, values, thread)
            to_tile(values, factor, tile[key, None], place + self.threads.part(thread, apart))
        cute.arch.fence_proxy("async.shared", space="cta")
        self.meet(part)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
            operand = getattr(self.operands, name)
            rows = block.grad_rows(operand, getattr(block.maps, name))
            target, source = operand.sides(rows, block.first_key, tile)
            cute.copy(rows.atom, source, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def factor(self, name: str, block: KeyBlock) -> Float32 | None:
        """What the result of the products is to be multiplied by."""
        if name == "grad_k":
            return Float32(block.call.softmax_scale)
        return Float32(block.call.keep_scale) if self.problem.dropout else None

    def dim(self, name: str) -> int:
        """Columns of dK or dV."""
        return scratch_columns(self.problem.head_dim if name == "grad_k" else self.problem.head_dim_v)

    def load(
        self, name: str, memory: Memory, first: int, count: int, row: cute.Tensor, thread: Int32
    ) -> None:
        """Read what is the thread's of a piece of dK or dV, of `count` columns, from place `first` on."""
        self.threads.load(memory.tensor, self.plan.at(name) + first, count, row, thread)

    def meet(self, part: int) -> None:
        """All threads of the warpgroup."""
        cute.arch.barrier(barrier_id=RESULT + part, number_of_threads=THREADS)


def to_tile(values: cute.Tensor, factor: Float32 | None, row: cute.Tensor, first: Int32 | int) -> None:
    """Columns from `first` on, times a factor, rounded into a row of a shared tile."""
    rounded = registers(cute.size(values), row.element_type)
    rounded.store((values.load() if factor is None else values.load() * factor).to(row.element_type))
    to_row(rounded, row, first)


def to_row(rounded: cute.Tensor, row: cute.Tensor, first: Int32 | int) -> None:
    """Registers to a row of a swizzled tile in shared memory, from column `first` on, 16 bytes at a time."""
    width = 128 // rounded.element_type.width
    for i in range(0, cute.size(rounded), width):
        source = cute.make_tensor(rounded.iterator + i, cute.make_layout(width))
        cute.autovec_copy(source, cute.local_tile(row, (width,), ((first + i) // width,)))
