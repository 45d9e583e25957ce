"""What one CTA of the main kernel works on, and the memory and edges that its roles share."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline

from ...common.key_block import KeyBlock, Launch
from ...common.memory import SmemAllocator, allocate, in_place
from ...common.operand import Operand
from ...common.order import unknown
from ...common.sequence import sequence_of
from ...problem import Problem
from ..edge import Edge
from .config import NUMBERS, OF_PAIRS, WARPGROUPS, Config, columns_of
from .plan import plan_of


class GradientOperands(NamedTuple):
    """What TMA moves, one head's at a time; maps of it; or tiles of it in shared memory.

    grad_k, grad_v: no maps where heads share keys. Of a pair, each CTA has half of the rows of Q and dO; and
    `OF_PAIRS`: of all of them, as of both CTAs' keys, half of the columns.
    """

    q: Any
    k: Any
    v: Any
    grad_out: Any
    grad_k: Any
    grad_v: Any
    q_columns: Any = None
    k_columns: Any = None
    out_columns: Any = None

    @staticmethod
    def of(problem: Problem, config: Config) -> GradientOperands:
        """The operands of a problem. Rows out of use come as zeros: what is there may be no numbers.

        No swizzled part of K is in two of the parts that dQ's columns come in.
        """
        ragged_q, ragged_k = problem.varlen or problem.seqused_q, problem.varlen or problem.seqused_k

        def operand(rows: int, columns: int, count: int, ragged: bool) -> Operand:
            return Operand.of(problem.precision, rows, columns, count, ragged)

        (columns, columns_v), rows, keys = columns_of(problem), config.cta_rows, config.cta_keys
        plan, of_pairs = plan_of(problem, config), {}
        if config.paired:
            of_pairs = {
                "q_columns": operand(config.tile_m, columns, 1, ragged_q).in_parts(2),
                "k_columns": operand(config.tile_n, columns, 1, ragged_k).in_parts(2),
                "out_columns": operand(config.tile_m, columns_v, 1, ragged_q).in_parts(2),
            }
        return GradientOperands(
            q=operand(rows, columns, config.q_stages, ragged_q),
            k=operand(keys, columns, 1, ragged_k).in_pieces(plan.fillings * plan.sides),
            v=operand(keys, columns_v, 1, ragged_k),
            grad_out=operand(rows, columns_v, config.out_stages, ragged_q),
            grad_k=operand(keys, columns, 1, problem.varlen),
            grad_v=operand(keys, columns_v, 1, problem.varlen),
            **of_pairs,
        )

    @staticmethod
    def source(name: str) -> str:
        """What of a call an operand is."""
        return {"q_columns": "q", "k_columns": "k", "out_columns": "grad_out"}.get(name, name)


def key_block(problem: Problem, config: Config, launch: Launch) -> KeyBlock:
    """What this CTA works on. Each role finds it anew: kept from before it would take registers."""
    cta, rank = cute.arch.block_idx()[0] + unknown(Int32(0)), 0
    if config.paired:
        cta, rank = cta // config.ctas, cta % config.ctas
    tile = launch.schedule.tile(cta, config.tile_n, problem.gqa)
    first_key = tile.first_key + rank * config.cta_keys
    sequence = sequence_of(launch.call, tile.batch)
    return KeyBlock(
        launch.call, launch.maps, sequence, tile.head, tile.kv_head, tile.member, first_key,
        tile.first_key, rank,
    )  # fmt: skip


class Tiles(NamedTuple):
    """Shared memory; see `Config.regions`."""

    moved: GradientOperands  # (rows, columns, tiles); dK and dV in the places of K and V
    ds: cute.Tensor  # (keys, rows, 1): dS transposed; of a pair see `pair`
    weights: cute.Tensor | None  # (keys, rows, 2): P and dS transposed, of a pair for wide heads; see `wide`
    sums: cute.Tensor  # (numbers, places) fp32: columns of dQ on their way
    shared_sums: cute.Tensor  # (numbers, warpgroups) fp32: the same of dK and dV, in the place of dS
    lse: cute.Tensor  # (rows, NUMBERS) fp32
    delta: cute.Tensor  # (rows, NUMBERS) fp32

    @staticmethod
    def allocate(smem: SmemAllocator, problem: Problem, config: Config, operands: GradientOperands) -> Tiles:
        """Places for all of it."""
        k, v, q, grad_out = (allocate(smem, getattr(operands, name)) for name in ("k", "v", "q", "grad_out"))
        grad_k, grad_v = in_place(k, operands.grad_k), in_place(v, operands.grad_v)
        precision = config.ds_precision(problem)
        ds = allocate(smem, Operand.of(precision, config.ds_keys, config.cta_rows, 1, False))
        beyond = WARPGROUPS * (config.regions(problem).size("ds") - config.regions(problem)["ds"].size)
        if beyond:  # sums of dK and dV, in the place of dS, take more than dS does
            smem.allocate_array(cutlass.Int8, beyond)
        weights, halves = None, dict.fromkeys(OF_PAIRS)
        if config.shared_weights:
            weights = allocate(smem, Operand.of(precision, config.cta_keys, config.tile_m, 2, False))
        if config.paired:
            # The columns of Q and dO have places of their own, or those of their rows.
            rows = {"q": q, "grad_out": grad_out}
            halves = {
                name: allocate(smem, operand) if name in config.moved
                else in_place(rows[config.channel(name)], operand)
                for name, operand in ((name, getattr(operands, name)) for name in OF_PAIRS)
            }  # fmt: skip

        def numbers(*shape: int) -> cute.Tensor:
            return smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=128)

        shared_sums = cute.make_tensor(
            cute.recast_ptr(ds.iterator, dtype=Float32),
            cute.make_layout((config.cta_keys * config.chunk, WARPGROUPS)),
        )
        return Tiles(
            moved=GradientOperands(q, k, v, grad_out, grad_k, grad_v, **halves),
            ds=ds,
            weights=weights,
            sums=numbers(config.cta_rows * config.chunk * plan_of(problem, config).sides, config.sums),
            shared_sums=shared_sums,
            lse=numbers(config.tile_m, NUMBERS),
            delta=numbers(config.tile_m, NUMBERS),
        )


class Memory(NamedTuple):
    """address: the word that says where tensor memory was given. tensor: tensor memory, see `plan.Plan`."""

    tiles: Tiles
    address: cute.Pointer
    tensor: cute.Pointer | None = None

    def looked_up(self) -> Memory:
        """With tensor memory's place, from its word."""
        return self._replace(tensor=cute.arch.retrieve_tmem_ptr(Float32, 16, self.address))


class Edges(NamedTuple):
    """Links without channels; a turn is a query tile.

    s, dp: filled by the mma warp, for the compute warps. p, ds: filled by these, P and dS in tensor memory,
    and dS in shared memory. s and p are emptied where they have columns of their own. grad_q: filled by the
    mma warp, emptied when the store warps have read it. grad_kv: filled once, when every product is complete.
    peer_ds, relayed: of a pair only; see `pair`.
    """

    s: Edge
    dp: Edge
    p: Edge
    ds: Edge
    grad_q: Edge
    grad_kv: Edge
    peer_ds: Edge | None = None
    relayed: Edge | None = None


class LoadEnds(NamedTuple):
    """The load warp's ends."""

    k: pipeline.PipelineProducer
    v: pipeline.PipelineProducer
    q: pipeline.PipelineProducer
    grad_out: pipeline.PipelineProducer
    numbers: pipeline.PipelineProducer
    q_columns: pipeline.PipelineProducer | None = None
    k_columns: pipeline.PipelineProducer | None = None
    out_columns: pipeline.PipelineProducer | None = None


class MmaEnds(NamedTuple):
    """The mma warp's ends of the same channels."""

    k: pipeline.PipelineConsumer
    v: pipeline.PipelineConsumer
    q: pipeline.PipelineConsumer
    grad_out: pipeline.PipelineConsumer
    q_columns: pipeline.PipelineConsumer | None = None
    k_columns: pipeline.PipelineConsumer | None = None
    out_columns: pipeline.PipelineConsumer | None = None
