"""The main kernel of the backward pass (Dao 2023, algorithm 2) for sm_90a, after FlashAttention-3's.

    compute   2 warpgroups   S, dP, dV and dK of half of the keys each, and a part of dQ, with wgmma
    load      1 warp         TMA: K and V, then every query tile's Q with LSE, and dO with D
    store     2 warps        dQ, added to its sum by bulk reductions; one for each compute warpgroup

    load --k, v--> compute, compute         once
    load --q--> compute, compute            `q_stages` tiles, with LSE of their rows
    load --grad_out--> compute, compute     `grad_out_stages` tiles, with D of their rows
    compute --grad_q--> store               a part of dQ for each warpgroup

A CTA keeps some keys of one query head; two may be a pair (pair.py). Registers move from load and store to
compute (setmaxnreg).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from ...backward import BackwardOperands, BackwardProblem
from ...common.channel import channel, channels_ready
from ...common.key_block import Launch
from ...common.keys import KeyTiles
from ...common.memory import SmemAllocator
from ...common.roles import Role, specialize_warps
from ...reverse import differentiated, seen_from_keys
from ..edge import Edge
from .compute import Compute, ComputeEnds
from .config import Config, PairConfig, Tiling, WideConfig
from .exchange import pair_meets
from .job import Edges, GradientOperands, Tiles
from .load import Load, LoadEnds, brought
from .pair import PairCompute
from .store import Store
from .topology import WARPGROUP, topology
from .turns import AsTheyCome, InTurns
from .wide import WideCompute

COMPUTE = {
    Config: Compute,
    WideConfig: WideCompute,
    PairConfig: PairCompute,
}


class Kinds(NamedTuple):
    """Of roles that kernels have of their own."""

    compute: type[Compute]
    load: type[Load]


class BackwardKernel:
    """The kernel for one problem and config: compiled with `BackwardOperands` and a stream."""

    def __init__(self, problem: BackwardProblem, config: Tiling):
        mask, score = problem.forward.mask, problem.forward.score
        self.problem = replace(
            problem.forward, mask=mask and seen_from_keys(mask), score=score and differentiated(score)
        )
        self.config, self.topology = config, topology(config)
        self.operands = GradientOperands.of(self.problem, config)
        tile = config.tile_m, config.tile_n
        self.turns = InTurns(self.problem, tile) if problem.deterministic else AsTheyCome()

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call, ctas = self.named(operands), self.config.ctas
        launch = Launch(call, self.maps(call), KeyTiles.of(call, self.config.tile_n))
        self.kernel(launch).launch(
            grid=(launch.schedule.tiles.count * ctas, 1, 1),
            block=(self.config.threads, 1, 1),
            cluster=(ctas, 1, 1) if ctas > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    def named(self, operands: list) -> BackwardOperands:
        """The operands of a launch, in their order, by their names."""
        return BackwardOperands(*operands)

    def kinds(self) -> Kinds:
        """Of the roles."""
        return Kinds(COMPUTE[type(self.config)], Load)

    def nbytes(self) -> dict[str, int]:
        """What comes at once through each channel."""
        numbers = 4 * self.config.tile_m
        k, v, peer_k = self.operands.k, self.operands.v, self.operands.peer_k
        return {
            "k": k.stages * k.bytes + (peer_k.stages * peer_k.bytes if peer_k else 0),
            "v": v.stages * v.bytes,
            "q": self.operands.q.bytes + numbers,
            "grad_out": self.operands.grad_out.bytes + numbers,
        }

    def maps(self, call: BackwardOperands) -> GradientOperands:
        """The tensors as TMA sees them."""
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        both = cpasync.CopyBulkTensorTileG2SMulticastOp() if self.config.ctas > 1 else load
        ways = {"q": both, "grad_out": both, "grad_k": store, "grad_v": store}
        made = {
            name: brought(operand, name, self.config).map(ways.get(name, load), tensor)
            for name, operand in self.operands._asdict().items()
            if operand is not None and (tensor := getattr(call, name.removeprefix("peer_"))) is not None
        }
        return GradientOperands(**{name: made.get(name) for name in GradientOperands._fields})

    @cute.kernel
    def kernel(self, launch: Launch):
        problem, config, links = self.problem, self.config, self.topology
        tiles, barriers = self.shared_memory()
        shared = {"q": config.ctas, "grad_out": config.ctas}
        channels = [
            channel(barriers, links[name], size, shared.get(name, 1)) for name, size in self.nbytes().items()
        ]
        names = ("grad_q", "peer_ds") if config.ctas > 1 else ("grad_q",)
        edges = Edges(*(Edge.at(barriers, links[name]) for name in names))
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            with cute.arch.elect_one():
                for name, edge in zip(names, edges, strict=False):
                    edge.make(links[name])
        channels_ready()
        if cutlass.const_expr(config.ctas > 1):
            pair_meets()
        kinds, store = self.kinds(), Store(problem, config, self.turns)
        compute = kinds.compute(problem, config, self.operands, self.turns)
        load = kinds.load(problem, config, self.operands)
        consumers = ComputeEnds(*(made.consumer for made in channels))
        producers = LoadEnds(*(made.producer for made in channels))
        roles = (
            Role(
                partial(compute.run, launch, tiles, consumers, edges),
                WARPGROUP * config.warpgroups,
                config.consumer_registers,
            ),
            Role(partial(load.run, launch, tiles, producers), 1, config.producer_registers),
            Role(
                partial(store.run, launch, tiles, edges.grad_q), config.warpgroups, config.producer_registers
            ),
        )
        specialize_warps(roles, config.launch_registers, warp)
        if cutlass.const_expr(config.ctas > 1):
            pair_meets()  # neither leaves while the other may still tell it something

    def shared_memory(self) -> tuple[Tiles, cute.Pointer]:
        """The tiles, and the barriers of all links."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        return Tiles.allocate(smem, self.problem, self.config, self.operands), barriers
