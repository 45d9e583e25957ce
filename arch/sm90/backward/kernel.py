"""The main kernel of the backward pass (Dao 2023, algorithm 2) for sm_90a, after FlashAttention-3's.

    compute   2 warpgroups   64 keys each: S^T, dP^T, dV, dK and a part of dQ with wgmma
    load      1 warp         TMA: K and V, then every query tile's Q with LSE, and dO with D
    store     2 warps        dQ, added to its sum by bulk reductions; one for each compute warpgroup

    load --k, v--> compute, compute         once, a tile for each warpgroup
    load --q--> compute, compute            `stages` tiles, with LSE of their rows
    load --grad_out--> compute, compute     `stages` tiles, with D of their rows
    compute --grad_q--> store               a part of dQ for each warpgroup

A CTA keeps tile_n keys of one query head. Registers move from load and store to compute (setmaxnreg).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from ...backward import BackwardOperands, BackwardProblem
from ...common.channel import channel, channels_ready
from ...common.memory import SmemAllocator
from ...common.roles import Role, specialize_warps
from ...common.schedule import OneTile
from ...common.sequence import extent
from ...reverse import differentiated, seen_from_keys
from .compute import Compute, ComputeEnds
from .edge import Edge
from .job import GradientOperands, Launch, Tiles
from .load import Load, LoadEnds
from .store import Result, Store
from .topology import WARPGROUP, topology
from .tuning import Config
from .turns import AsTheyCome, InTurns


class BackwardKernel:
    """The kernel for one problem and config: compiled with `BackwardOperands` and a stream."""

    def __init__(self, problem: BackwardProblem, config: Config):
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
        call = BackwardOperands(*operands)
        keys, batches = extent(call.k, call.cu_seqlens_k, call.max_seqlen_k)
        heads = call.q.shape[-2]
        schedule = OneTile(cute.ceil_div(keys, self.config.tile_n), heads, batches)
        launch = Launch(call, self.maps(call), schedule, heads // call.k.shape[-2])
        self.kernel(launch).launch(
            grid=schedule.grid(), block=(self.config.threads, 1, 1), stream=stream, min_blocks_per_mp=1
        )

    def maps(self, call: BackwardOperands) -> GradientOperands:
        """The tensors as TMA sees them."""
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        made = {
            name: operand.map(store if name in ("grad_k", "grad_v") else load, getattr(call, name))
            for name, operand in self.operands._asdict().items()
            if getattr(call, name) is not None
        }
        return GradientOperands(**{name: made.get(name) for name in GradientOperands._fields})

    @cute.kernel
    def kernel(self, launch: Launch):
        problem, config, links = self.problem, self.config, self.topology
        tiles, barriers = self.shared_memory()
        numbers = 4 * config.tile_m
        nbytes = {
            "k": config.warpgroups * self.operands.k.bytes,
            "v": config.warpgroups * self.operands.v.bytes,
            "q": self.operands.q.bytes + numbers,
            "grad_out": self.operands.grad_out.bytes + numbers,
        }
        channels = [channel(barriers, links[name], size) for name, size in nbytes.items()]
        edge = Edge.at(barriers, links["grad_q"])
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            with cute.arch.elect_one():
                edge.make(links["grad_q"])
        channels_ready()
        compute = Compute(problem, config, Result(problem, config, self.operands, self.turns))
        load, store = Load(problem, config, self.operands), Store(problem, config, self.turns)
        consumers = ComputeEnds(*(made.consumer for made in channels))
        producers = LoadEnds(*(made.producer for made in channels))
        roles = (
            Role(
                partial(compute.run, launch, tiles, consumers, edge),
                WARPGROUP * config.warpgroups,
                config.consumer_registers,
            ),
            Role(partial(load.run, launch, tiles, producers), 1, config.producer_registers),
            Role(partial(store.run, launch, tiles, edge), config.warpgroups, config.producer_registers),
        )
        specialize_warps(roles, config.launch_registers, warp)

    def shared_memory(self) -> tuple[Tiles, cute.Pointer]:
        """The tiles, and the barriers of all links."""
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        return Tiles.allocate(smem, self.problem, self.config, self.operands), barriers
