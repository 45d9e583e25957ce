"""Matrix descriptors of wgmma and tcgen05: which bytes of shared memory an operand tile is made of.

A descriptor (64 bits) names a start address and two strides; the instruction knows the tile's shape and
which way its elements run. Interface, for descriptors as uint64 arrays with one entry per tile:

    tile = Tile(rows, k, bits, mn_major)             operand A (rows = M) or B (rows = N) of one instruction
    chunks = locate(words, TCGEN05, tile)            (n, outer, inner) int64: addresses of 16-byte chunks
    read(m.shared, owners, chunks, tile, fault)      (n, rows, k) uint8/16/32: the elements, checked

Memory holds 16-byte chunks of consecutive elements: along k if K-major (outer = row, inner = chunk of k),
along M or N if MN-major (outer = k, inner = chunk of rows). Places of chunks, W the width of the swizzle in
bytes (PTX ISA, canonical layouts of wgmma and tcgen05, in units of 16 bytes):

    K-major, none        (r % 8) 16 + (r / 8) SBO + chunk LBO
    K-major, swizzled    (r % 8) W + (r / 8) SBO + 16 chunk               LBO has no meaning
    MN-major, none       (k % 8) 16 + (k / 8) LBO + chunk SBO
    MN-major, swizzled   (k % 8) W + (k / 8) SBO + (16 chunk) % W + (16 chunk / W) LBO

The swizzle is an XOR on the whole address (bits 4-6 with bits 7-9 for 128 bytes, fewer for narrower ones),
so a start address may lie inside an 8-row pattern, in any of its rows. Strides that break the pattern are
refused: no kernel is known to rely on what follows from the formulas alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..base.errors import EmulatorError, OutOfBounds, UninitializedRead, UnmodelledInstruction
from ..core.memory import UNSIGNED, OwnedMemory

CHUNK = 16  # bytes that every layout keeps together
PERIOD = 1024  # bytes after which every swizzle repeats
_CHUNK = np.dtype(f"V{CHUNK}")


class Tile(NamedTuple):
    """An operand of one instruction. rows: of M or N; k: elements; bits: of an element as it lies in memory.

    mn_major: elements of neighbouring rows are neighbours in memory ("transposed"). copied: rows that
    tcgen05.cp moves, which may have 16 bytes; those of a product's operand have 32.
    """

    rows: int
    k: int
    bits: int
    mn_major: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Encoding:
    """Where one family of instructions keeps the fields. swizzles: code -> width in bytes, 16 for none.

    fixed: bits that must hold a value, as (mask, value).
    """

    name: str
    swizzle_shift: int
    swizzles: tuple[tuple[int, int], ...]
    fixed: tuple[int, int]


class Layout(NamedTuple):
    """The fields of a descriptor but its address; bytes."""

    width: int
    leading: int
    stride: int


_BASE_OFFSET = 7 << 49
_RESERVED = 3 << 14 | 3 << 30
WGMMA = Encoding(
    "wgmma", 62, ((0, 16), (1, 128), (2, 64), (3, 32)), (_RESERVED | 7 << 46 | _BASE_OFFSET | 0x3FF << 52, 0)
)
TCGEN05 = Encoding(
    "tcgen05",
    61,
    ((0, 16), (2, 128), (4, 64), (6, 32)),
    (_RESERVED | 7 << 46 | _BASE_OFFSET | 0x1FF << 52, 1 << 46),
)


def start_address(words: np.ndarray) -> np.ndarray:
    """The start address of each descriptor, int64."""
    return (words & np.uint64(0x3FFF)).astype(np.int64) * CHUNK


def layout(word: int, encoding: Encoding) -> Layout:
    """The fields of one descriptor. Raises UnmodelledInstruction where they have no known meaning."""
    mask, value = encoding.fixed
    if word & _BASE_OFFSET:
        raise UnmodelledInstruction(f"descriptor {word:#018x}: base offset {word >> 49 & 7} is not modelled")
    if word & mask != value:
        wrong = (word ^ value) & mask
        raise UnmodelledInstruction(
            f"descriptor {word:#018x}: bits {wrong:#x} are not as {encoding.name} fixes them"
        )
    code = word >> encoding.swizzle_shift
    width = dict(encoding.swizzles).get(code)
    if width is None:
        raise UnmodelledInstruction(f"descriptor {word:#018x}: swizzle code {code} is not modelled")
    return Layout(width, *((word >> at & 0x3FFF) * CHUNK for at in (16, 32)))


@lru_cache(maxsize=4096)
def table(place: Layout, tile: Tile, phase: int) -> np.ndarray:
    """Addresses of a tile's chunks for start address `phase` (below PERIOD): int64 (outer, inner).

    Any other start address adds a multiple of PERIOD. Raises UnmodelledInstruction for layouts that only
    the formulas define.
    """
    _check(place, tile, phase)
    width, leading, stride = place
    outer, inner = (tile.k, tile.rows) if tile.mn_major else (tile.rows, tile.k)
    line = np.arange(outer)[:, None]
    chunk = np.arange(inner * tile.bits // (8 * CHUNK))[None, :]
    if width == CHUNK:
        far, near = (leading, stride) if tile.mn_major else (stride, leading)
        address = line % 8 * CHUNK + line // 8 * far + chunk * near
    else:
        address = line % 8 * width + line // 8 * stride + chunk * CHUNK % width
        address = address + chunk * CHUNK // width * leading
    address = address + phase
    address ^= (address >> 7 & width // CHUNK - 1) << 4
    address.flags.writeable = False
    return address


def _check(place: Layout, tile: Tile, phase: int) -> None:
    """Raise unless the tile is one that kernels are known to use."""
    width, leading, stride = place
    major = "MN" if tile.mn_major else "K"
    inner = (tile.rows if tile.mn_major else tile.k) * tile.bits // 8
    what = f"{major}-major, swizzle {width if width > CHUNK else 'none'}"

    def refuse(why: str) -> UnmodelledInstruction:
        return UnmodelledInstruction(f"a {what} operand of {tile.rows} rows and k {tile.k} {why}")

    if tile.rows % 8 or inner % CHUNK or (tile.k * tile.bits % 256 and not tile.copied):
        raise refuse("is not whole chunks")
    if tile.mn_major and tile.bits not in (8, 16):
        raise refuse(f"of {tile.bits}-bit elements is not modelled")
    if width == CHUNK:
        return
    whole = phase % width == 0 and inner % width == 0 and tile.mn_major
    if not whole and phase % width + inner > width:
        raise refuse(f"that crosses the swizzle's width from byte {phase % width} on is not modelled")
    used = [("stride byte offset", stride, (tile.k if tile.mn_major else tile.rows) > 8)]
    used.append(("leading byte offset", leading, inner > width))
    for name, offset, matters in used:
        if matters and offset % (8 * width):
            raise refuse(f"whose {name} {offset} breaks the pattern of {8 * width} bytes is not modelled")


def locate(words: np.ndarray, encoding: Encoding, tile: Tile) -> np.ndarray:
    """Addresses of the 16-byte chunks of tiles: int64 (n, outer, inner) for descriptors uint64 (n,)."""
    start = start_address(words)
    phase = start % PERIOD
    keys = words & np.uint64(0xFFFFFFFFFFFFC000) | (phase // CHUNK).astype(np.uint64)
    base = (start - phase)[:, None, None]
    if (keys == keys[0]).all():
        return table(layout(int(keys[0]) & -1 << 14, encoding), tile, int(phase[0])) + base
    unique, inverse = np.unique(keys, return_inverse=True)
    tables = [
        table(layout(key & -1 << 14, encoding), tile, (key & 0x3FFF) * CHUNK) for key in unique.tolist()
    ]
    return np.stack(tables)[inverse] + base


def read(
    memory: OwnedMemory,
    owners: np.ndarray,
    chunks: np.ndarray,
    tile: Tile,
    fault: Callable[[type[EmulatorError], int, str], EmulatorError],
) -> np.ndarray:
    """The elements of tiles at `chunks` (from locate): (n, rows, k), unsigned of tile.bits, maybe a view.

    owners: whose copy of `memory` each tile is in, (n,). 4-bit elements come as bytes, (n, rows, k / 2).
    fault(kind, number of the tile, text) makes the error for OutOfBounds and UninitializedRead.
    """
    check_bounds(memory, chunks, fault)
    at = (chunks + (owners * memory.stride)[:, None, None]) // CHUNK
    if memory.strict:
        _check_written(memory, chunks, at, fault)
    held = memory.bytes.reshape(-1).view(_CHUNK).take(at)
    values = held.view(UNSIGNED[max(tile.bits, 8) // 8])
    return values.swapaxes(1, 2) if tile.mn_major else values


def check_bounds(memory: OwnedMemory, chunks: np.ndarray, fault: Callable) -> None:
    """Raise OutOfBounds unless all chunks lie inside the space."""
    if int(chunks.min()) >= memory.base and int(chunks.max()) + CHUNK <= memory.end:
        return
    bad = (chunks < memory.base) | (chunks + CHUNK > memory.end)
    k = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
    where = int(chunks[k][bad[k]][0])
    limits = f"{memory.space} memory is [{memory.base}, {memory.end})"
    raise fault(OutOfBounds, k, f"an operand's bytes at {memory.space} {where:#x}: {limits}")


def _check_written(memory: OwnedMemory, chunks: np.ndarray, at: np.ndarray, fault: Callable) -> None:
    flags = memory.written.reshape(-1).view(_CHUNK).take(at).view(np.uint64)
    if int(flags.min()) == 0x0101010101010101:
        return
    missing = flags.view(np.uint8).reshape(*at.shape, CHUNK) == 0
    k, outer, inner, byte = (int(v[0]) for v in np.nonzero(missing))
    where = int(chunks[k, outer, inner]) + byte
    raise fault(UninitializedRead, k, f"{memory.space} byte {where:#x} of an operand was never written")
