"""FlashAttention-4's forward pass with block-scaled products for sm_100a, sm_103a and sm_110a.

Roles, links and their order are those for 16 bits (`..forward.kernel`); P has 8 bits, as in FP8.

    load       with each tile its factors, which fill the same slot
    mma        brings them to tensor memory, before the products that read them
    softmax    as in FP8, with scales of whole heads
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from ...block_scaled import BlockScaledOperands, BlockScaledProblem
from ...common.element import element_type, elements
from ...common.memory import SmemAllocator, Tiles
from ...common.operand import Operand
from ...precision import FLOAT8_E4M3
from ...problem import Operands
from ..config import TILE_M
from ..forward.kernel import ForwardKernel
from ..forward.topology import topology
from ..group import Group
from .config import Config
from .factors import mapped, places
from .job import FactorMaps, FactorTiles, Maps, Memory
from .load import BlockScaledLoad
from .mma import BlockScaledMma
from .products import Plan, Products
from .softmax import BlockScaledSoftmax


class BlockScaledKernel(ForwardKernel):
    """The kernel for one problem and config: `cute.compile(kernel, *operands, stream)`."""

    softmax_role, load_role, mma_role = BlockScaledSoftmax, BlockScaledLoad, BlockScaledMma

    def __init__(self, problem: BlockScaledProblem, config: Config):
        self.problem, self.config, self.topology = problem, config, topology(problem, config)
        self.factors = config.factors(problem)
        dim_v = problem.head_dim_v
        # TMA moves bytes, of which 4-bit elements share one.
        width = problem.precision.nbytes(problem.head_dim)
        self.q = Operand.of(FLOAT8_E4M3, TILE_M, width, config.tiles, problem.varlen)
        self.k = Operand.of(FLOAT8_E4M3, config.tile_n, width, config.k_stages, problem.ragged_k)
        self.v = Operand.of(problem.v_precision, config.tile_n, dim_v, config.v_stages, problem.ragged_k)
        self.out = Operand.of(problem.out_precision, TILE_M, dim_v, config.tiles, problem.varlen)
        columns = tuple((name, found.columns) for name, found in self.factors.items())
        padded, bits = problem.v_precision.padded(dim_v), problem.p_precision.bits
        self.plan = Plan(config.tiles, config.slots, config.tile_n, padded, bits, columns)
        self.group = Group(config.ctas)

    def named(self, operands: list) -> BlockScaledOperands:
        """With elements for the bytes that q, k and v are passed as."""
        call = BlockScaledOperands(*operands)
        q, k, v = (elements(x, cutlass.Float8E4M3FN) for x in (call.q, call.k, call.v))
        return call._replace(q=q, k=k, v=v)

    def maps(self, call: Operands, group: Int32) -> Maps:
        data, op = super().maps(call, group), cpasync.CopyBulkTensorTileG2SOp()
        given = zip("qkv", (call.q_factors, call.k_factors, call.v_factors), strict=True)
        found = [None if x is None else mapped(self.factors[name], op, x) for name, x in given]
        return Maps(*data, FactorMaps(*found))

    def products(self) -> Products:
        dtype, p_dtype = map(element_type, (self.problem.precision, self.problem.p_precision))
        return Products(dtype, p_dtype, self.plan, self.group, bool(self.problem.v_group))

    def slot_bytes(self) -> dict[str, int]:
        nbytes = super().slot_bytes()
        return nbytes | {name: nbytes[name] + found.bytes for name, found in self.factors.items()}

    def shared_memory(self) -> tuple[Memory, cute.Pointer, None]:
        config, smem = self.config, SmemAllocator()
        barriers = smem.allocate_array(Int64, self.topology.count)
        address = smem.allocate_array(Int32, 1)
        shape = (TILE_M, config.slots + 1, config.tiles)
        rescales = smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=16)
        factor_tiles = [
            smem.allocate_tensor(Int64, places(self.factors[name]), byte_alignment=128)
            if name in self.factors
            else None
            for name in "qkv"
        ]
        tiles = Tiles.allocate(smem, self.q, self.k, self.v, self.out, apart=True)
        return Memory(tiles, rescales, address, FactorTiles(*factor_tiles)), barriers, None
