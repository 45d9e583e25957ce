"""What FlashAttention-3's FP8 tiles ask of an SM of Hopper, by arithmetic: its kernels take nvcc to compile.

Tiles: Shah et al., FlashAttention-3, hopper/tile_size.h at 0251105a. Both products are by wgmma of 64 rows a
warpgroup; V is brought to K-major in shared memory by the warpgroup that loads (mainloop_fwd_sm90_tma_gmma_ws
of the same commit), once for each tile of keys. The same arithmetic on our tiles is what the emulator counts
of ours, and a test holds it. Of what only machine code tells it is what no such kernel does without: a
maximum, an fma, an exponential, an addition and half a conversion for a score, a multiplication for each of
O's numbers and a tile, and for 16 columns and 32 keys of V ldmatrix, four permutations and stmatrix.
"""

from __future__ import annotations

from .cycles import Cost
from .rates import WARP

WGMMA_ROWS = 64
QUAD = 4  # lanes that hold a row, each of which computes what the row's sum and O are multiplied by
# Head dims -> rows of Q, and keys at a time.
FLASH_ATTENTION_3 = {(64, 64): (192, 160), (128, 128): (128, 224)}


def cost(tile: tuple[int, int], dims: tuple[int, int], q_kept: bool = False) -> Cost:
    """Of a tile's products, exponentials and shared memory; the rest at least. q_kept: in registers."""
    (rows, keys), (dim, dim_v) = tile, dims
    read = rows // WGMMA_ROWS * (WGMMA_ROWS * dim * (not q_kept) + keys * dim + keys * dim_v)  # of Q, K, V
    copied, transposed = keys * (dim + dim_v), 2 * keys * dim_v
    scores, pieces = rows * keys, keys * dim_v / (32 * 16)
    return Cost(
        flops=2 * scores * (dim + dim_v),
        mma_sync=False,
        mufu=rows * (keys + QUAD),
        fma=2 * scores + rows * dim_v,
        alu=1.5 * scores + 4 * pieces * WARP,
        issue=(4.5 * scores + rows * dim_v) / WARP + 6 * pieces,
        shared=read + copied + transposed,
        bits=8,
    )


def flash_attention_3(dims: tuple[int, int]) -> tuple[tuple[int, int], Cost]:
    """Its tile for head dims, and what that asks for."""
    tile = FLASH_ATTENTION_3[dims]
    return tile, cost(tile, dims)
