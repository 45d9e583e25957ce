"""FlashAttention-4 forward (Zadouri et al. 2026) for sm_100a, sm_103a and sm_110a.

    softmax      4 warps per Q tile   S -> P, one row per thread; S and P in tensor memory
    correction   4 warps              O *= factor where a maximum was raised; in the end O / sum
    mma          1 warp               S = Q K and O += P V with tcgen05, tile by tile
    load         1 warp               TMA: Q, then K[n] and V[n], latest first
    store        1 warp               TMA: O, from shared memory

    load --q--> mma                        a stage for each Q tile
    load --k, v--> mma                     K and V apart, so that a product waits for its own tile only
    mma --s--> softmax, correction         `slots` for each Q tile; back when P is stored and O rescaled
    softmax --tail--> mma                  P's last columns, one for each S: P V has begun without them
    softmax --factors--> correction        one for each S
    softmax --final_scale--> correction    one for each Q tile: what normalises O
    mma --o--> correction                  one for each Q tile: O after its last block, or after each
    correction --out--> store              one for each Q tile: O in 16 bits, in Q's place or beside it

One CTA, or a pair of CTAs, takes `tile_m` rows of one query head, or of several that share a KV head, with
all keys or one split of them (Dao et al. 2023, "Flash-Decoding"): then correction writes O in fp32, from
registers, and there is no store role. It takes one tile, or persists and takes every n-th: then O leaves
under the next tile's loads.

In a pair each CTA runs all roles but mma, which only the leader's warp does for both:

    load of both --> mma of the leader --> softmax and correction of both --> mma of the leader
"""

from __future__ import annotations

from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from ...common.channel import Channel, mma_channel
from ...common.element import element_type
from ...common.heads import TileHeads, parts_of
from ...common.job import Job, Launch, rows_of_tile
from ...common.memory import Maps, SmemAllocator, Tiles
from ...common.operand import Operand
from ...common.roles import Role, specialize_warps
from ...common.schedule import in_order, tile_per_cta
from ...common.sequence import cached_sequence_of, extent
from ...common.topology import Barriers
from ...elementwise import minimum
from ...problem import Operands, Problem
from ...scheduled import Schedule, without_schedule
from ..config import ANSWERS, TILE_M, Config
from ..edge import Edge
from ..group import Group
from ..mma import Products
from ..scheduler import ClcScheduler
from ..tmem import Plan
from .correction import Correction
from .job import Edges, LoadEnds, Memory, MmaEnds, Past, Work
from .load import Load
from .mma import Mma
from .output import Partial, Result
from .softmax import Softmax
from .store import Store
from .topology import WARPGROUP, topology

CHANNELS = ("q", "k", "v")  # the links that TMA fills


class ForwardKernel:
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    softmax_role: type[Softmax] = Softmax
    load_role: type[Load] = Load
    mma_role: type[Mma] = Mma

    def __init__(self, problem: Problem, config: Config):
        if config.persistent and not problem.equal_tiles:
            raise ValueError(f"CTAs persist where all tiles have as many blocks: no {config} for {problem}")
        self.problem, self.config, self.topology = problem, config, topology(problem, config)
        precision, dim, dim_v = problem.precision, problem.head_dim, problem.head_dim_v
        ragged_k = problem.ragged_k
        # A tile's O may take the place of its own Q, but not that of another.
        pitch = 0 if config.apart else TILE_M * max(precision.padded(dim), precision.padded(dim_v))
        q = Operand.of(precision, TILE_M, dim, config.tiles, problem.varlen, pitch)
        out = Operand.of(problem.out_precision, TILE_M, dim_v, config.tiles, problem.varlen, pitch)
        self.q, self.out = q.packed(config.heads), out.packed(config.heads)
        k = Operand.of(precision, config.tile_n // config.ctas, dim, config.k_stages, ragged_k)
        v = Operand.of(precision, config.tile_n, dim_v, config.v_stages, ragged_k).in_parts(config.ctas)
        self.k, self.v = k.in_pages(problem.page_size), v.in_pages(problem.page_size)
        columns = precision.padded(dim_v, config.ctas)
        self.plan = Plan(config.tiles, config.slots, config.tile_n, columns, precision.bits)
        self.group = Group(config.ctas)

    def named(self, operands: list) -> Operands:
        """The operands of a launch, in their order, by their names."""
        return without_schedule(operands)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)
        multiprocessors, call = call.multiprocessors, call._replace(multiprocessors=None)
        group = call.q.shape[-2] // call.k.shape[-2]
        rows, batches = extent(call.q, call.cu_seqlens_q, call.max_seqlen_q)
        maps = self.maps(call, group)
        splits = call.out.shape[0] if cutlass.const_expr(self.problem.split_kv) else None
        heads = call.q.shape[-2]
        if cutlass.const_expr(self.config.heads > 1):
            heads = call.k.shape[-2] * parts_of(self.config.heads, group)
        schedule = tile_per_cta(cute.ceil_div(rows, rows_of_tile(self.config)), heads, batches, splits)
        schedule = in_order(schedule, Schedule.of(self.problem, operands))
        groups = schedule.count
        if cutlass.const_expr(self.config.persistent):
            groups = minimum(groups, multiprocessors // self.config.ctas)
        grid, threads = (groups * self.config.ctas, 1, 1), (self.config.threads, 1, 1)
        self.kernel(Launch(call, maps, schedule, group)).launch(
            grid=grid, block=threads, cluster=self.group.cluster, stream=stream, min_blocks_per_mp=1
        )

    def maps(self, call: Operands, group: Int32) -> Maps:
        """The tensors as TMA sees them."""
        load, store = self.group.loads(), cpasync.CopyBulkTensorTileS2GOp()
        return Maps(
            q=self.q.map(load, call.q, group),
            k=self.k.map(load, call.k),
            v=self.v.map(load, call.v),
            out=None if self.problem.split_kv else self.out.map(store, call.out, group),
        )

    @cute.kernel
    def kernel(self, launch: Launch):
        if cutlass.const_expr(self.config.is_persistent):
            self.work(launch)
        else:
            job = self.job(launch, self.group.index())
            if job.first_row < job.sequence.q_rows:
                self.work(launch)

    def job(self, launch: Launch, index: Int32) -> Job:
        """Tile `index` of a launch."""
        call, maps, schedule, group = launch.call, launch.maps, launch.schedule, launch.group
        tile = schedule.tile(index)
        heads = TileHeads.of(self.problem, self.config.heads, tile.head, group)
        first_row = tile.m_block * rows_of_tile(self.config)
        sequence, splits = cached_sequence_of(call, tile.batch), schedule.splits_of(tile.batch)
        return Job(call, maps, sequence, heads, first_row, tile.split, splits)

    @cute.jit
    def run(self, role: cutlass.Constexpr, launch: Launch, memory: Memory, edges: Edges, ends, warp: Int32):
        """A role's part of all tiles that this CTA takes.

        Each role looks up its sequence and tensor memory itself: kept from before they would take registers.
        """
        first, run, memory = self.group.index(), role.run, memory.looked_up()
        if cutlass.const_expr(self.config.persistent):
            turns, tiles = Int32(0), Int32(0)
            step = cute.arch.grid_dim()[0] // self.config.ctas
            for index in cutlass.range(first, launch.schedule.count, step, unroll=1):
                # All tiles have as many blocks.
                work = Work(self.job(launch, index), memory, edges, Past(turns, tiles, tiles))
                ends, visited = run(work, ends, warp)
                turns, tiles = turns + visited, tiles + 1
        elif cutlass.const_expr(self.config.dynamic):
            index, tile, past = first, Int32(0), Past(Int32(0), Int32(0), Int32(0))
            while index >= 0:
                if cutlass.const_expr(role.fetches_tiles):
                    edges.scheduler.fetch(tile, self.group)
                work = Work(self.job(launch, index), memory, edges, past)
                ends, past = self.if_any(run, work, ends, warp)
                index, tile = edges.scheduler.next(tile, self.group), tile + 1
        else:
            ends, _ = run(Work(self.job(launch, first), memory, edges, Past()), ends, warp)
        role.close(ends, warp)

    @cute.jit
    def if_any(self, run: cutlass.Constexpr, work: Work, ends, warp: Int32):
        """Run a role on a tile that may lie beyond its sequence: then ends and past stay as they are."""
        turns, tiles, filled = work.past
        if work.job.first_row < work.job.sequence.q_rows:
            ends, visited = run(work, ends, warp)
            turns, tiles, filled = turns + visited, tiles + 1, filled + Int32(visited > 0)
        return ends, Past(turns, tiles, filled)

    @cute.jit
    def work(self, launch: Launch):
        plan, group, links = self.plan, self.group, self.topology
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory, barriers, answers = self.shared_memory()
        channels = [
            mma_channel(barriers, links[name], nbytes, self.config.ctas)
            for name, nbytes in self.slot_bytes().items()
        ]
        edges = self.edges(barriers, answers, warp)
        if warp == 0:
            group.allocate(plan.allocated, memory.address)
        group.ready()
        specialize_warps(self.roles(launch, memory, edges, *channels), self.config.launch_registers, warp)
        group.sync()
        if warp == 0:
            group.free(memory.looked_up().tensor, plan.allocated)

    def roles(
        self, launch: Launch, memory: Memory, edges: Edges, q: Channel, k: Channel, v: Channel
    ) -> tuple[Role, ...]:
        """What the warps of a CTA do, in their order."""
        problem, config, plan = self.problem, self.config, self.plan
        load = self.load_role(problem, config, self.q, self.k, self.v)
        mma = self.mma_role(problem, config, self.products())
        output = Partial(problem, config) if problem.split_kv else Result(config, self.out.dtype)
        softmax = self.softmax_role(problem, config, element_type(problem.p_precision), plan, output)
        correction = Correction(problem, config, plan, output)
        shared, small_role_registers = (launch, memory, edges), config.other_registers
        consumers = MmaEnds(q.consumer, k.consumer, v.consumer)
        producers = LoadEnds(q.producer, k.producer, v.producer)
        roles = (
            Role(partial(self.run, softmax, *shared, ()), WARPGROUP * config.tiles, config.softmax_registers),
            Role(partial(self.run, correction, *shared, ()), WARPGROUP, config.correction_registers),
            Role(partial(self.run, mma, *shared, consumers), 1, small_role_registers),
            Role(partial(self.run, load, *shared, producers), 1, small_role_registers),
        )
        if not problem.split_kv:
            store = Store(config, self.out)
            roles += (Role(partial(self.run, store, *shared, ()), 1, small_role_registers),)
        return roles

    def products(self) -> Products:
        """Of tiles."""
        dtype, p_dtype = map(element_type, (self.problem.precision, self.problem.p_precision))
        return Products(dtype, p_dtype, self.plan, self.group)

    @cute.jit
    def edges(self, barriers: cute.Pointer, answers: cute.Pointer, warp: Int32):
        """The links without channels, between roles of this CTA and its peer, made by one thread."""
        made = {name: Edge.at(barriers, placed) for name, placed in self.edge_barriers().items()}
        if warp == 0:
            with cute.arch.elect_one():
                for name, placed in self.edge_barriers().items():
                    made[name].make(placed)
        scheduler = ClcScheduler(made.pop("scheduler"), answers) if self.config.dynamic else None
        return Edges(**made, scheduler=scheduler)

    def slot_bytes(self) -> dict[str, int]:
        """What fills a slot of the links that TMA fills."""
        return {"q": self.q.bytes, "k": self.k.bytes, "v": self.v.bytes}

    def edge_barriers(self) -> dict[str, Barriers]:
        """Of the links without channels."""
        return {link.name: placed for link, placed in self.topology.placed() if link.name not in CHANNELS}

    def shared_memory(self) -> tuple[Memory, cute.Pointer, cute.Pointer]:
        """What the roles share, the barriers, and answers."""
        config = self.config
        smem = SmemAllocator()
        answers = smem.allocate_array(cutlass.Int128, ANSWERS)
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        address = smem.allocate_array(cutlass.Int32, 1)
        shape = (TILE_M, config.slots + 1, config.tiles)
        factors = smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=16)
        tiles = Tiles.allocate(smem, self.q, self.k, self.v, self.out, apart=config.apart)
        return Memory(tiles, factors, address), barriers, answers
