"""The load role: one warp brings K and V, then the query tiles in the order of their visits.

Tiles come by TMA, LSE and D of their rows by bulk copies that complete on the same barriers. Q and dO are
asked to stay in L2, for the other key tiles that read them. The CTAs of a pair, which visit the same tiles,
bring half of each into both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int16, Int32, Int64, pipeline
from cutlass.cute.nvgpu import cpasync

from ...common.blocks import Listed, Range
from ...common.key_block import KeyBlock, Launch
from ...common.operand import HeadRows, Operand
from ...common.rules import Rules
from ...problem import Problem
from ..forward.load import EVICT_FIRST, EVICT_LAST
from .config import ROWS, Tiling
from .job import GradientOperands, Tiles, key_block


class LoadEnds(NamedTuple):
    k: pipeline.PipelineProducer
    v: pipeline.PipelineProducer
    q: pipeline.PipelineProducer
    grad_out: pipeline.PipelineProducer


class Load:
    """operands: those that it fills."""

    def __init__(self, problem: Problem, config: Tiling, operands: GradientOperands):
        self.problem, self.config, self.operands = problem, config, operands
        self.brought = GradientOperands(
            *(brought(operand, name, config) for name, operand in operands._asdict().items())
        )

    @cute.jit
    def run(self, launch: Launch, tiles: Tiles, ends: LoadEnds, warp: Int32):
        for mapped in launch.maps[:4]:
            cpasync.prefetch_descriptor(mapped.atom)
        block = key_block(self.problem, self.config, launch)
        if block.any():
            self.key_block(block, tiles, ends)

    @cute.jit
    def key_block(self, block: KeyBlock, tiles: Tiles, ends: LoadEnds):
        operands, maps = self.brought, block.maps
        rules = Rules.of(self.problem, block.call, block.sequence, block.head)
        visits = block.visits(self.problem, self.config, rules)
        if visits.any():
            q, grad_out = (
                block.q_rows(operand, mapped)
                for operand, mapped in ((operands.q, maps.q), (operands.grad_out, maps.grad_out))
            )
            # In the order of the products: S of K and Q, then dP of V and dO.
            slot = ends.k.acquire_and_advance()
            self.bring_k(block, tiles, slot)
            slot = ends.q.acquire_and_advance()
            self.bring_q(block, q, self.first_row(visits, visits.start), tiles, slot)
            slot = ends.v.acquire_and_advance()
            self.keys(block, operands.v, maps.v, tiles.moved.v, slot)
            for i in cutlass.range(visits.total - 1, unroll=1):
                place = visits.after(visits.start, i)
                slot = ends.grad_out.acquire_and_advance()
                self.bring_grad_out(block, grad_out, self.first_row(visits, place), tiles, slot)
                slot = ends.q.acquire_and_advance()
                self.bring_q(block, q, self.first_row(visits, visits.after(place, 1)), tiles, slot)
            slot = ends.grad_out.acquire_and_advance()
            self.bring_grad_out(block, grad_out, self.first_row(visits, visits.end), tiles, slot)

    def bring_k(self, block: KeyBlock, tiles: Tiles, slot) -> None:
        """Begin copying what comes with K."""
        self.keys(block, self.brought.k, block.maps.k, tiles.moved.k, slot)
        if self.brought.peer_k is not None:
            self.keys_of_peer(block, tiles, slot)

    def bring_q(self, block: KeyBlock, q: HeadRows, row: Int32, tiles: Tiles, slot) -> None:
        """Begin copying what comes with a tile of Q."""
        self.rows(self.brought.q, q, row, tiles.moved.q, slot)
        self.numbers(block, block.call.lse_log2, row, tiles.lse, slot)

    def bring_grad_out(self, block: KeyBlock, grad_out: HeadRows, row: Int32, tiles: Tiles, slot) -> None:
        """Begin copying what comes with a tile of dO."""
        self.rows(self.brought.grad_out, grad_out, row, tiles.moved.grad_out, slot)
        self.numbers(block, block.call.delta, row, tiles.delta, slot)

    def first_row(self, visits: Range | Listed, place: Int32) -> Int32:
        return Int32(visits.block(place)) * self.config.tile_m

    def rows(
        self, operand: Operand, rows: HeadRows, first: Int32, tiles: cute.Tensor, slot
    ) -> None:
        """Begin copying a tile of Q or dO, from row `first` on; of a pair's each half of it, into both."""
        tile = tiles[None, None, slot.index]
        if self.config.ctas == 1:
            self.copy(operand, rows, first, tile, slot, EVICT_LAST)
        else:
            rank = cute.arch.block_idx_in_cluster()
            half = cute.local_tile(tile, (operand.rows, operand.columns), (rank, 0))
            first += rank * operand.rows
            self.copy(operand, rows, first, half, slot, EVICT_LAST, mcast_mask=Int16(0b11))

    def keys(self, block: KeyBlock, operand: Operand, mapped, tiles: cute.Tensor, slot) -> None:
        """Begin copying all tiles of K or V."""
        rows = block.k_rows(operand, mapped)
        for i in range(operand.stages):
            first = block.first_key + i * operand.rows
            self.copy(operand, rows, first, tiles[None, None, i], slot, EVICT_FIRST)

    def keys_of_peer(self, block: KeyBlock, tiles: Tiles, slot) -> None:
        """Begin copying what the CTA needs of K of the other of a pair: its own columns of dQ."""
        operand, config = self.operands.peer_k, self.config
        rows = operand.part(block.k_rows(operand, block.maps.peer_k), block.rank)
        for i in range(operand.stages):
            first = block.tile_key + (1 - block.rank) * config.cta_keys + i * operand.rows
            self.copy(operand, rows, first, tiles.moved.peer_k[None, None, i], slot, EVICT_FIRST)

    def copy(
        self, operand: Operand, rows: HeadRows, first: Int32, tile: cute.Tensor, slot, policy: int, **into
    ) -> None:
        """Begin copying rows `first` and on into a tile. into: which CTAs', where not this one's alone."""
        source, target = operand.sides(rows, first, tile)
        cute.copy(rows.atom, source, target, tma_bar_ptr=slot.barrier, cache_policy=Int64(policy), **into)

    def numbers(
        self, block: KeyBlock, numbers: cute.Tensor, first: Int32, tiles: cute.Tensor, slot
    ) -> None:
        """Begin copying LSE or D of a tile's rows, from row `first` on: scratch has whole tiles."""
        place = cute.assume(block.scratch_q(self.problem) + first, divby=ROWS)
        rows = cute.domain_offset((place,), numbers[block.head, None])
        source = cute.local_tile(rows, (self.config.tile_m,), (0,))
        atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
        with cute.arch.elect_one():
            cute.copy(atom, source, tiles[None, slot.index], mbar_ptr=slot.barrier)


def brought(operand: Operand | None, name: str, config: Tiling) -> Operand | None:
    """What one CTA copies at a time of an operand's tiles: of Q and dO half, where it has a peer."""
    if name not in ("q", "grad_out"):
        return operand
    return replace(operand, rows=operand.rows // config.ctas)
