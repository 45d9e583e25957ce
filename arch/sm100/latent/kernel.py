"""Latent attention (MLA, DeepSeek-V2 2024, section 2.1, absorbed) for sm_100a, sm_103a and sm_110a.

    softmax      4 warps     S -> P, two threads to a row; S in tensor memory, P in shared memory
    correction   4 warps     O *= factor where a maximum was raised; in the end O / sum
    mma          1 warp      S = Q K and O += P V of both CTAs with tcgen05
    load_k       1 warp      TMA: Q, then the CTA's half of the rows of K[n], latest first
    load_v       1 warp      TMA: its half of the columns of V[n]
    store        1 warp      TMA: O, from shared memory

    load_k --q--> mma
    load_k --k--> mma                      parts of 64 columns
    load_v --v--> mma                      parts of up to 128 columns
    mma --s--> softmax, correction         two; back when P is stored and O rescaled
    softmax --factors--> correction        one for each S
    softmax --final_scale--> correction    what normalises O
    mma --o--> correction, softmax         after each P V: O may be rescaled, the next P stored
    correction --out--> store              O in 16 bits, in Q's place

A pair of CTAs has 128 rows, heads of a query or queries, 64 each: of 512 columns a CTA's O takes half of
tensor memory, and every row of K is multiplied once for both.
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from ...common.channel import Channel
from ...common.element import element_type
from ...common.job import Job, Launch
from ...common.memory import Maps, SmemAllocator, Tiles, allocate, in_place
from ...common.operand import Operand
from ...common.roles import Role
from ...problem import Operands, Problem
from ..config import TILE_M
from ..forward.job import Edges, LoadEnds, MmaEnds
from ..forward.kernel import ForwardKernel
from ..forward.store import Store
from ..forward.topology import WARPGROUP
from ..group import Group
from .config import ROWS, Config, k_parts, v_columns, v_parts
from .job import Memory
from .load import LoadK, LoadV
from .mma import LatentMma
from .output import LatentCorrection, Partial, Result
from .products import Plan, Products
from .softmax import LatentSoftmax
from .topology import topology


class LatentKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: Problem, config: Config):
        self.problem, self.config, self.topology = problem, config, topology(problem, config)
        precision, dim, dim_v = problem.precision, problem.head_dim, problem.head_dim_v
        q = Operand.of(precision, ROWS, dim, 1, problem.varlen)
        out = Operand.of(problem.out_precision, ROWS, dim_v, 1, problem.varlen)
        heads = min(config.heads, ROWS)
        self.q, self.out = q.packed(heads), out.packed(heads)
        slots, ragged = {name: self.topology[name].slots for name in "kv"}, problem.ragged_k
        k = Operand.of(precision, config.tile_n // config.ctas, dim, slots["k"], ragged)
        v = Operand.of(precision, config.tile_n, dim_v, slots["v"], ragged)
        k, v = k.in_parts(k_parts(problem)), v.in_parts(config.ctas * v_parts(problem))
        self.k, self.v = k.in_pages(problem.page_size), v.in_pages(problem.page_size)
        self.p = Operand.of(problem.p_precision, ROWS, config.tile_n, 1, False)
        self.plan = Plan(1, config.slots, config.tile_n // config.ctas, dim_v // config.ctas)
        self.group = Group(config.ctas)

    def maps(self, call: Operands, group: Int32) -> Maps:
        """V is K."""
        load, store = self.group.loads(), cpasync.CopyBulkTensorTileS2GOp()
        out = None if self.problem.split_kv else self.out.map(store, call.out, group)
        q, k, v = self.q.map(load, call.q, group), self.k.map(load, call.k), self.v.map(load, call.k)
        return Maps(q, k, v, out)

    def job(self, launch: Launch, index: Int32) -> Job:
        """Of more heads than a CTA has rows, each has its own."""
        job = super().job(launch, index)
        if self.config.heads <= ROWS:
            return job
        kv, first = job.heads.place
        return job._replace(heads=job.heads._replace(place=(kv, first + self.group.rank() * ROWS)))

    def roles(
        self, launch: Launch, memory: Memory, edges: Edges, q: Channel, k: Channel, v: Channel
    ) -> tuple[Role, ...]:
        problem, config, plan = self.problem, self.config, self.plan
        dtype, p_dtype = map(element_type, (problem.precision, problem.p_precision))
        of_split, whole = Partial(problem, config), Result(config, self.out.dtype, plan.dim_v)
        output = of_split if problem.split_kv else whole
        softmax = LatentSoftmax(problem, config, p_dtype, plan, output)
        correction = LatentCorrection(problem, config, plan, output)
        mma = LatentMma(problem, config, Products(dtype, plan, self.group, v_columns(problem)))
        operands = self.q, self.k, self.v
        consumers = MmaEnds(q.consumer, k.consumer, v.consumer)
        producers = LoadEnds(q.producer, k.producer, v.producer)
        given = [
            (softmax, (), WARPGROUP, config.softmax_registers),
            (correction, (), WARPGROUP, config.correction_registers),
            (mma, consumers, 1, config.other_registers),
            (LoadK(problem, config, *operands), producers, 1, config.other_registers),
            (LoadV(problem, config, *operands), producers, 1, config.other_registers),
        ]
        if not problem.split_kv:
            given.append((Store(config, self.out), (), 1, config.other_registers))
        return tuple(
            Role(partial(self.run, role, launch, memory, edges, ends), warps, registers)
            for role, ends, warps, registers in given
        )

    def shared_memory(self) -> tuple[Memory, cute.Pointer, None]:
        config, smem = self.config, SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        address = smem.allocate_array(cutlass.Int32, 1)
        factors, maxima = (
            smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=16)
            for shape in ((TILE_M, config.slots + 1, 1), (TILE_M, 2))
        )
        q, k, v, p = (allocate(smem, operand) for operand in (self.q, self.k, self.v, self.p))
        tiles = Tiles(q, k, v, in_place(q, self.out))
        parts = k_parts(self.problem)
        q_parts = Operand.of(self.problem.precision, ROWS, self.problem.head_dim, parts, False)
        q_parts = in_place(q, q_parts.in_parts(parts))
        return Memory(tiles, factors, address, q_parts, p, maxima), barriers, None
