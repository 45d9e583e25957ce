"""What FlashAttention-3's FP8 tiles ask of an SM of Hopper, by arithmetic: its kernels take nvcc to compile.

Tiles: Shah et al., FlashAttention-3, hopper/tile_size.h at 0251105a. Both products are by wgmma of 64 rows a
warpgroup; V is brought to K-major in shared memory by the warpgroup that loads (mainloop_fwd_sm90_tma_gmma_ws
of the same commit), once for each tile of keys. The same arithmetic on our tiles is what the emulator counts
of ours, and a test holds it.
"""

from __future__ import annotations

from .cycles import Cost

WGMMA_ROWS = 64
QUAD = 4  # lanes that hold a row, each of which computes what the row's sum and O are multiplied by
# Head dims -> rows of Q, and keys at a time.
FLASH_ATTENTION_3 = {(64, 64): (192, 160), (128, 128): (128, 224)}


def cost(tile: tuple[int, int], dims: tuple[int, int]) -> Cost:
    """Of a tile's products, exponentials and shared memory; the rest, which only machine code tells, is 0."""
    (rows, keys), (dim, dim_v) = tile, dims
    read = rows // WGMMA_ROWS * (WGMMA_ROWS * dim + keys * dim + keys * dim_v)  # Q, K, V; P is in registers
    copied, transposed = keys * (dim + dim_v), 2 * keys * dim_v
    return Cost(
        flops=2 * rows * keys * (dim + dim_v),
        mma_sync=False,
        mufu=rows * (keys + QUAD),
        fma=0.0,
        alu=0.0,
        issue=0.0,
        shared=read + copied + transposed,
        bits=8,
    )


def flash_attention_3(dims: tuple[int, int]) -> tuple[tuple[int, int], Cost]:
    """Its tile for head dims, and what that asks for."""
    tile = FLASH_ATTENTION_3[dims]
    return tile, cost(tile, dims)
