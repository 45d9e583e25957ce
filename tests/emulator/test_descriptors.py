"""Matrix descriptors against the canonical layouts of the PTX ISA, evaluated element by element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cute_flash.emulator import OutOfBounds, UninitializedRead, UnmodelledInstruction
from cute_flash.emulator.core.memory import OwnedMemory
from cute_flash.emulator.units.descriptors import TCGEN05, WGMMA, Tile, locate, read, start_address

from .tiles import canonical, descriptor, swizzled

TILES = [
    Tile(64, 16, 16), Tile(128, 16, 16), Tile(8, 16, 16), Tile(64, 32, 8), Tile(24, 8, 32), Tile(128, 64, 4),
    Tile(64, 16, 16, True), Tile(256, 16, 16, True), Tile(128, 32, 8, True),
]  # fmt: skip


def packed_strides(tile: Tile, width: int) -> tuple[int, int]:
    """(LBO, SBO) of a tile without gaps, and a bit more, so that the two are never alike."""
    if width == 16:
        return (16 * 1024, 256) if tile.mn_major else (tile.rows * 16 + 128, 128)
    return 8 * 1024, 8 * width * 2


@pytest.mark.parametrize("encoding", [WGMMA, TCGEN05], ids=lambda e: e.name)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_element_is_where_the_canonical_layout_has_it(tile, width, encoding):
    """Elements are numbered; each is put where the layout says, and all must be found again."""
    memory = OwnedMemory("shared", 2, 1024, 227 * 1024)
    strides = packed_strides(tile, width)
    starts = [2048, 5120] + [2048 + 32] * (width > 32 and not tile.mn_major)
    starts += [2048 + 3 * width, 5120 + 7 * width] * (width > 16)  # in the middle of a pattern's eight rows
    for start, owner in itertools.product(starts, (0, 1)):
        memory.bytes[:], memory.written[:] = 0xFF, 0
        wanted = np.random.default_rng(start).integers(0, 256, (tile.rows, tile.k * tile.bits // 8), np.uint8)
        size = max(tile.bits // 8, 1)
        columns = tile.k * tile.bits // 8 // size
        for row, column in itertools.product(range(tile.rows), range(columns)):
            element = column * 8 * size // tile.bits
            at = swizzled(start + canonical(row, element, tile, width, strides), width)
            memory.bytes[owner, at : at + size] = wanted[row, column * size : column * size + size]
            memory.written[owner, at : at + size] = 1
        words = descriptor(encoding.name, start, *strides, width)
        chunks = locate(words, encoding, tile)
        got = read(memory, np.array([owner]), chunks, tile, lambda kind, k, text: kind(text))
        assert got.shape == (1, tile.rows, columns)
        assert (np.ascontiguousarray(got[0]).view(np.uint8).reshape(wanted.shape) == wanted).all()
        assert chunks.size * 16 == wanted.size and len(np.unique(chunks)) == chunks.size


def test_many_tiles_at_once():
    """Descriptors that differ in address, in phase and in layout give what each gives alone."""
    tile = Tile(64, 16, 16)
    same = [descriptor("wgmma", 1024 * k, 0, 1024, 128) for k in range(1, 4)]
    phases = [descriptor("wgmma", 1024 + 32 * k, 0, 1024, 128) for k in range(4)]
    mixed = [*phases, descriptor("wgmma", 4096, 2048, 128, 16), descriptor("wgmma", 4096, 0, 512, 64)]
    for words in (same, phases, mixed):
        together = locate(np.concatenate(words), WGMMA, tile)
        assert (together == np.concatenate([locate(w, WGMMA, tile) for w in words])).all()


def test_start_addresses_reach_256_kilobytes():
    word = descriptor("wgmma", 0x3FFF0, 0, 0, 16)
    assert start_address(word).tolist() == [0x3FFF0]


@pytest.mark.parametrize(
    ("word", "tile", "what"),
    [
        (descriptor("wgmma", 1024, 0, 1024, 128, 1 << 49), Tile(64, 16, 16), "base offset 1"),
        (descriptor("wgmma", 1024, 0, 1024, 128, 1 << 46), Tile(64, 16, 16), "as wgmma fixes them"),
        (descriptor("wgmma", 1024, 0, 1024, 128, 1 << 61), Tile(64, 16, 16), "as wgmma fixes them"),
        (descriptor("wgmma", 1024 + 112, 0, 1024, 128), Tile(64, 16, 16), "crosses the swizzle's width"),
        (descriptor("wgmma", 1024 + 16, 0, 256, 32), Tile(64, 16, 16), "crosses the swizzle's width"),
        (descriptor("wgmma", 1024, 0, 512, 128), Tile(64, 16, 16), "stride byte offset 512 breaks"),
        (descriptor("wgmma", 1024, 128, 1024, 128), Tile(128, 16, 16, True), "leading byte offset 128"),
        (descriptor("wgmma", 1024 + 64, 0, 1024, 128), Tile(64, 16, 16, True), "crosses the swizzle's width"),
        (descriptor("wgmma", 1024, 0, 1024, 128), Tile(64, 8, 32, True), "32-bit elements"),
        (descriptor("wgmma", 1024, 0, 1024, 128), Tile(12, 16, 16), "not whole chunks"),
        (descriptor("wgmma", 1024, 0, 1024, 128), Tile(64, 8, 16), "not whole chunks"),
    ],
)
def test_what_no_kernel_uses_is_refused(word, tile, what):
    with pytest.raises(UnmodelledInstruction, match=what):
        locate(word, WGMMA, tile)


@pytest.mark.parametrize(
    ("extra", "what"), [(1 << 52, "as tcgen05"), (1 << 61, "code"), (1 << 53, "as tcgen05")]
)
def test_tcgen05_forms_without_a_model(extra, what):
    with pytest.raises(UnmodelledInstruction, match=what):
        locate(descriptor("tcgen05", 1024, 0, 1024, 128, extra), TCGEN05, Tile(64, 16, 16))
    with pytest.raises(UnmodelledInstruction, match="as tcgen05"):
        locate(descriptor("wgmma", 1024, 0, 1024, 64), TCGEN05, Tile(64, 16, 16))


def test_part_of_a_pattern_is_enough():
    """32 rows of 16 bits, MN-major, in either half of a 128-byte row."""
    tile, half = Tile(32, 16, 16, True), 64
    low, high = (locate(descriptor("wgmma", 1024 + k, 0, 1024, 128), WGMMA, tile) for k in (0, half))
    assert len(np.intersect1d(low, high)) == 0
    whole = locate(descriptor("wgmma", 1024, 8192, 1024, 128), WGMMA, Tile(64, 16, 16, True))
    assert (np.union1d(low, high) == np.unique(whole)).all()


def test_bounds_and_initialisation_are_checked():
    memory = OwnedMemory("shared", 1, 1024, 4096)
    tile = Tile(64, 16, 16)

    def fetch(start: int, stride: int = 256) -> np.ndarray:
        chunks = locate(descriptor("wgmma", start, 128, stride, 16), WGMMA, tile)
        return read(memory, np.array([0]), chunks, tile, lambda kind, k, text: kind(f"{k}: {text}"))

    with pytest.raises(UninitializedRead, match="0: shared byte 0x400 "):
        fetch(1024)
    memory.written[:] = 1
    memory.written[0, 3000] = 0
    with pytest.raises(UninitializedRead, match=f"shared byte {3000:#x} "):
        fetch(1024)
    fetch(3008)
    with pytest.raises(OutOfBounds, match="shared 0x1400: shared memory is"):
        fetch(3072 + 16)
    with pytest.raises(OutOfBounds, match="shared 0x3f0"):
        fetch(1008)
    memory.strict = False
    assert (fetch(1024) == 0xFFFF).all()
