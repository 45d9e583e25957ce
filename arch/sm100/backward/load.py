"""The load role: one warp brings K and V, then the query tiles in the order of their visits.

Tiles come by TMA; LSE and D of a tile's rows together, by bulk copies.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from ...common.blocks import Listed, Range
from ...common.key_block import KeyBlock, Launch
from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...problem import Problem
from .config import Config
from .job import GradientOperands, LoadEnds, Memory, key_block


class Load:
    """operands: those that it fills."""

    def __init__(self, problem: Problem, config: Config, operands: GradientOperands):
        self.problem, self.config, self.operands = problem, config, operands

    @cute.jit
    def run(self, launch: Launch, memory: Memory, ends: LoadEnds, warp: Int32):
        operands, tiles, maps = self.operands, memory.tiles, launch.maps
        moved = tiles.moved
        for mapped in maps[:4]:
            cpasync.prefetch_descriptor(mapped.atom)
        block = key_block(self.problem, self.config, launch)
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if visits.any():
            q, grad_out = (
                block.q_rows(operand, mapped)
                for operand, mapped in ((operands.q, maps.q), (operands.grad_out, maps.grad_out))
            )
            k, v = (
                block.k_rows(operand, mapped)
                for operand, mapped in ((operands.k, maps.k), (operands.v, maps.v))
            )
            # In the order of the products: S of K and Q, then dP of V and dO.
            row = self.first_row(visits, visits.start)
            slot = ends.k.acquire_and_advance()
            self.copy(operands.k, k, block.first_key, moved.k, slot)
            slot = ends.q.acquire_and_advance()
            self.copy(operands.q, q, row, moved.q, slot)
            slot = ends.numbers.acquire_and_advance()
            self.numbers(block, row, memory, slot)
            slot = ends.v.acquire_and_advance()
            self.copy(operands.v, v, block.first_key, moved.v, slot)
            slot = ends.grad_out.acquire_and_advance()
            self.copy(operands.grad_out, grad_out, row, moved.grad_out, slot)
            for i in cutlass.range(visits.total - 1, unroll=1):
                row = self.first_row(visits, visits.after(visits.start, i + 1))
                slot = ends.q.acquire_and_advance()
                self.copy(operands.q, q, row, moved.q, slot)
                slot = ends.numbers.acquire_and_advance()
                self.numbers(block, row, memory, slot)
                slot = ends.grad_out.acquire_and_advance()
                self.copy(operands.grad_out, grad_out, row, moved.grad_out, slot)

    def first_row(self, visits: Range | Listed, place: Int32) -> Int32:
        return Int32(visits.block(place)) * self.config.tile_m

    def copy(self, operand: Operand, rows: HeadRows, first: Int32, tiles: cute.Tensor, slot) -> None:
        """Begin copying rows `first` and on into the slot's tile."""
        source, target = operand.sides(rows, first, tiles[None, None, slot.index])
        cute.copy(rows.atom, source, target, tma_bar_ptr=slot.barrier)

    def numbers(self, block: KeyBlock, first: Int32, memory: Memory, slot) -> None:
        """Begin copying LSE and D of a tile's rows, from row `first` on: scratch has whole tiles."""
        count = self.config.tile_m
        place = cute.assume(block.scratch_q(self.problem) + first, divby=count)
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        for numbers, tiles in (
            (block.call.lse_log2, memory.tiles.lse), (block.call.delta, memory.tiles.delta)
        ):
            rows = cute.domain_offset((place,), numbers[block.head, None])
            source = cute.local_tile(rows, (count,), (0,))
            with cute.arch.elect_one():
                cute.copy(atom, source, tiles[None, slot.index], mbar_ptr=slot.barrier)
