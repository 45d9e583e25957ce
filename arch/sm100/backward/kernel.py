"""The main kernel of the backward pass for sm_100a, sm_103a and sm_110a, after FlashAttention-4's.

    store      4 warps    dQ from tensor memory, added to its sum by bulk reductions
    compute    8 warps    S -> P and dP -> dS, one key per thread; in the end dK and dV
    mma        1 warp     S^T, dP^T, dV, dK and dQ with tcgen05: see `products`
    load       1 warp     TMA: K and V, then every query tile's Q and dO, with LSE and D

    load --k, v--> mma                    once
    load --q, grad_out--> mma             `q_stages` and `out_stages` tiles
    load --numbers--> compute, compute    LSE and D of a tile's rows
    mma --s, dp--> compute, compute       S^T and dP^T of a query tile
    compute, compute --p, ds--> mma       P^T and dS^T, in the same places of tensor memory
    mma --grad_q--> store                 dQ of a query tile
    mma --grad_kv--> compute, compute     once: dK and dV of the keys

A CTA keeps 128 or 64 keys of one query head, and dK and dV of them in tensor memory: see `plan`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from ...backward import BackwardOperands, BackwardProblem
from ...common.channel import channel, mma_channel
from ...common.element import element_type
from ...common.key_block import Launch
from ...common.keys import KeyTiles
from ...common.memory import SmemAllocator
from ...common.roles import Role, specialize_warps
from ...reverse import differentiated, seen_from_keys
from ..edge import Edge
from ..group import Group
from .compute import Compute
from .config import WARPGROUPS, Config, SerialConfig, WideConfig
from .job import Edges, GradientOperands, LoadEnds, Memory, MmaEnds, Tiles, key_block
from .load import Load
from .mma import Mma
from .pair import PEER_EDGES, PairCompute, PairLoad, PairMma
from .plan import plan_of
from .products import Products
from .serial import SerialCompute, SerialLoad, SerialMma, SerialStore
from .store import Result, Store
from .topology import WARPGROUP, topology
from .turns import AsTheyCome, InTurns
from .wide import WideCompute, WideLoad, WideMma


class BackwardKernel:
    """The kernel for one problem and config: compiled with `BackwardOperands` and a stream."""

    def __init__(self, problem: BackwardProblem, config: Config):
        mask, score = problem.forward.mask, problem.forward.score
        self.problem = replace(
            problem.forward, mask=mask and seen_from_keys(mask), score=score and differentiated(score)
        )
        self.config, self.topology = config, topology(config)
        self.operands = GradientOperands.of(self.problem, config)
        self.plan, self.group = plan_of(self.problem, config), Group(config.ctas)
        tile = config.tile_m, config.tile_n
        self.turns = InTurns(self.problem, tile) if problem.deterministic else AsTheyCome()

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = self.named(operands)
        launch = Launch(call, self.maps(call), KeyTiles.of(call, self.config.tile_n))
        tiles, *_ = launch.schedule.grid()
        grid, block = (tiles * self.config.ctas, 1, 1), (self.config.threads, 1, 1)
        self.kernel(launch).launch(
            grid=grid, block=block, cluster=self.group.cluster, stream=stream, min_blocks_per_mp=1
        )

    def named(self, operands: list) -> BackwardOperands:
        """The operands of a launch, in their order, by their names."""
        return BackwardOperands(*operands)

    def kinds(self) -> Kinds:
        """Of the roles."""
        return roles_of(self.config)

    def products(self) -> Products:
        """What tensor cores multiply."""
        precisions = self.problem.precision, self.problem.p_precision, self.config.ds_precision(self.problem)
        return Products(*map(element_type, precisions), self.plan, self.group)

    def maps(self, call: BackwardOperands) -> GradientOperands:
        """The tensors as TMA sees them."""
        load, store = self.group.loads(), cpasync.CopyBulkTensorTileS2GOp()
        made = {
            name: operand.map(store if name in ("grad_k", "grad_v") else load, getattr(call, source))
            for name, operand in self.operands._asdict().items()
            if operand is not None and getattr(call, source := GradientOperands.source(name)) is not None
        }
        return GradientOperands(**{name: made.get(name) for name in GradientOperands._fields})

    @cute.kernel
    def kernel(self, launch: Launch):
        block = key_block(self.problem, self.config, launch)
        if block.any():
            self.work(launch)

    @cute.jit
    def work(self, launch: Launch):
        problem, config, plan, group, links = self.problem, self.config, self.plan, self.group, self.topology
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tiles, barriers, address = self.shared_memory()
        channels = {
            name: mma_channel(barriers, links[name], getattr(self.operands, name).bytes, config.ctas)
            for name in config.moved
        }
        numbers = channel(barriers, links["numbers"], 2 * 4 * config.tile_m)
        edges = self.edges(barriers, warp)
        if warp == 0:
            group.allocate(plan.allocated, address)
        group.ready()
        memory, products = Memory(tiles, address), self.products()
        producers = {name: made.producer for name, made in channels.items()}
        producers = LoadEnds(**producers, numbers=numbers.producer)
        consumers = MmaEnds(**{name: made.consumer for name, made in channels.items()})
        result = Result(problem, config, plan, self.operands, self.turns, group)
        kinds = self.kinds()
        compute = kinds.compute(problem, config, plan, result, group)
        mma, load = kinds.mma(problem, config, products), kinds.load(problem, config, self.operands)
        store = kinds.store(problem, config, plan, self.turns, group)
        roles = (
            Role(partial(store.run, launch, memory, edges), WARPGROUP, config.store_registers),
            Role(
                partial(compute.run, launch, memory, edges, numbers.consumer),
                WARPGROUP * WARPGROUPS,
                config.compute_registers,
            ),
            Role(partial(mma.run, launch, memory, edges, consumers), 1, config.other_registers),
            Role(partial(load.run, launch, memory, producers), 1, config.other_registers),
        )
        specialize_warps(roles, config.launch_registers, warp)
        group.sync()
        if warp == 0:
            group.free(memory.looked_up().tensor, plan.allocated)

    @cute.jit
    def edges(self, barriers: cute.Pointer, warp: Int32):
        """The links without channels, made by one thread."""
        names = [name for name in Edges._fields if self.config.paired or name not in PEER_EDGES]
        made = {name: Edge.at(barriers, self.topology[name]) for name in names}
        if warp == 0:
            with cute.arch.elect_one():
                for name, edge in made.items():
                    edge.make(self.topology[name])
        return Edges(**made)

    def shared_memory(self) -> tuple[Tiles, cute.Pointer, cute.Pointer]:
        """The tiles, the barriers of all links, and a word for tensor memory's address."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        address = smem.allocate_array(cutlass.Int32, 1)
        return Tiles.allocate(smem, self.problem, self.config, self.operands), barriers, address


class Kinds(NamedTuple):
    """Of the roles, as a config has them."""

    store: type[Store]
    compute: type[Compute]
    mma: type[Mma]
    load: type[Load]


def roles_of(config: Config) -> Kinds:
    """Those of a CTA alone, or of one of a pair."""
    if isinstance(config, WideConfig):
        return Kinds(Store, WideCompute, WideMma, WideLoad)
    if isinstance(config, SerialConfig):
        return Kinds(SerialStore, SerialCompute, SerialMma, SerialLoad)
    if config.paired:
        return Kinds(Store, PairCompute, PairMma, PairLoad)
    return Kinds(Store, Compute, Mma, Load)
