"""Operand tiles in shared memory by the PTX ISA's canonical layouts, element by element."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BASE = 1024  # where shared memory begins from sm_90 on
CODES = {"wgmma": {16: 0, 128: 1, 64: 2, 32: 3}, "tcgen05": {16: 0, 128: 2, 64: 4, 32: 6}}


class Tile(NamedTuple):
    """An operand's shape, element width in bits and direction, as the emulator's own."""

    rows: int
    k: int
    bits: int
    mn_major: bool = False


def descriptor(
    family: str, address: int, leading: int, stride: int, width: int, extra: int = 0
) -> np.ndarray:
    """One descriptor with the fields of the PTX ISA's tables."""
    code = CODES[family][width]
    word = address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | extra
    word |= code << 62 if family == "wgmma" else code << 61 | 1 << 46
    return np.array([word], np.uint64)


def offset(coordinate: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Position of a coordinate, split by `shape` with its first part fastest."""
    position, rest = 0, coordinate
    for size, stride in zip(shape, strides, strict=True):
        position += rest % size * stride
        rest //= size
    return position


def canonical(row: int, k: int, tile: Tile, width: int, strides: tuple[int, int]) -> int:
    """Byte of the first bit of an element: the canonical layouts, in elements of tile.bits.

    T elements are 16 bytes. K-major: ((8, m), (T, 2k)) : ((wT, SBO), (1, T or LBO)). MN-major without a
    swizzle: ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO)); with one ((T, w, m), (8, k)) :
    ((1, T, LBO), (wT, SBO)), w = width / 16.
    """
    leading, stride = (s * 8 // tile.bits for s in strides)
    t, w, many = 128 // tile.bits, width // 16, 1 << 20
    if not tile.mn_major:
        by_row = offset(row, (8, many), (w * t, stride))
        by_k = offset(k, (t, many), (1, leading if w == 1 else t))
    elif w == 1:
        by_row = offset(row, (t, many), (1, stride))
        by_k = offset(k, (8, many), (t, leading))
    else:
        by_row = offset(row, (t, w, many), (1, t, leading))
        by_k = offset(k, (8, many), (w * t, stride))
    return (by_row + by_k) * tile.bits // 8


def swizzled(address: int, width: int) -> int:
    bits = {16: 0, 32: 1, 64: 2, 128: 3}[width]
    return address ^ (address >> 7 & (1 << bits) - 1) << 4


def place(
    image: np.ndarray, start: int, values: np.ndarray, tile: Tile, layout: tuple[int, tuple[int, int]]
) -> None:
    """Write the elements values[row, k] (unsigned of the tile's width) into bytes `image`.

    image[0] is shared address BASE; layout: swizzle width and (LBO, SBO).
    """
    width, strides = layout
    size = values.itemsize
    for row in range(tile.rows):
        for k in range(tile.k):
            at = swizzled(start + canonical(row, k, tile, width, strides), width) - BASE
            image[at : at + size] = values[row : row + 1, k].view(np.uint8)
