"""Bulk copies and TMA: where every byte lands, when, and what is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_flash.emulator import (
    BarrierError,
    DataRace,
    Deadlock,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    UninitializedRead,
    UnmodelledInstruction,
)
from cute_flash.emulator.units.tensor_map import decode

from .evaluate import aligned, launch, module
from .test_mbarrier import ORDERS, READY, wait

HEAD = """
    .reg .b32 %t, %w, %l, %b, %r<9>;
    .reg .b64 %out, %in, %map, %s<4>;
    .reg .pred %first, %p<5>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    and.b32 %l, %t, 31;
    mov.b32 %b, 1024;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    ld.param.u64 %map, [map];
    setp.eq.u32 %first, %t, 0;
    @%first mbarrier.init.shared.b64 [%b], 1;
"""
PARAMS = ".param .u64 in, .param .u64 out, .param .u64 map"
BUFFER = 2048
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def map_bytes(address: int, sizes, strides, box, element: str = "b16", swizzle: int = 0) -> bytes:
    """A tensor map as host code writes it. sizes, box in elements; strides in bytes, of dims 1 and up."""
    code, extent = {"u8": (0, 1), "u16": (1, 2), "b16": (10, 2), "f16": (6, 2), "f32": (7, 4)}[element]
    assert box[0] * extent % 16 == 0
    word = [0] * 16
    word[0], word[1] = address & 0xFFFFFFFF, address >> 32
    word[2] = 1 << 1 | (len(sizes) - 1) << 4 | code << 7 | SWIZZLES[swizzle] << 13 | 1 << 18
    for d, stride in enumerate(strides):
        word[3 + d] = stride // 16 & 0xFFFFFFFF
        word[7] |= (stride // 16 >> 32) << 4 * d
    for d, size in enumerate(sizes):
        word[8 + d] = size - 1
    raw = bytearray(struct.pack("<16I", *word) + bytes(64))
    for d, extent in enumerate(box):
        raw[55 + d] = extent - 1
    return bytes(raw)


def run(code: str, source: np.ndarray, made=None, out_bytes: int = 4096, block: int = 64, **options):
    """(bytes that the kernel stored at out, source after it). made(address): the tensor map."""
    held, out = aligned(source.reshape(-1), 128), aligned(np.zeros(out_bytes, np.uint8), 128)
    raw = made(held.ctypes.data) if made else bytes(128)
    described = aligned(np.frombuffer(raw, np.uint8), 64)
    options = {"races": True, **options}
    launch(module(HEAD + code, PARAMS, "sm_90a"), [held, out, described], block=block, shared=8192, **options)
    return out, held


def dump(nbytes: int) -> str:
    """Threads copy the buffer to out, after a barrier."""
    return f"""
    shl.b32 %r8, %t, 2;
    loop: setp.ge.u32 %p4, %r8, {nbytes};
    @%p4 bra done;
    add.u32 %r7, %r8, {BUFFER};
    ld.shared.b32 %r6, [%r7];
    cvt.u64.u32 %s3, %r8;
    add.u64 %s3, %s3, %out;
    st.global.b32 [%s3], %r6;
    mov.u32 %r5, %ntid.x;
    shl.b32 %r5, %r5, 2;
    add.u32 %r8, %r8, %r5;
    bra loop;
    done:
    """


def load_box(rank: int, at: tuple[int, ...], nbytes: int) -> str:
    places = ", ".join(str(a) for a in at)
    copy = f"cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    return f"""
    {READY}
    @!%first bra rest;
    mbarrier.arrive.expect_tx.shared.b64 _, [%b], {nbytes};
    {copy} [{BUFFER}], [%map, {{{places}}}], [%b];
    rest:
    {wait(0)}
    {dump(nbytes)}
    """


def expected_box(source: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """The box at `at` (dim 0 first), zeros outside; as an array with the outermost dimension first."""
    found = np.zeros(box[::-1], source.dtype)
    for place in np.ndindex(*box[::-1]):
        where = tuple(p + a for p, a in zip(place, at[::-1], strict=True))
        if all(0 <= w < n for w, n in zip(where, source.shape, strict=True)):
            found[place] = source[where]
    return found


def unswizzle(raw: np.ndarray, swizzle: int) -> np.ndarray:
    """Undo the swizzle byte by byte, from the definition: row bits are XORed into the 16-byte chunk's."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    at = np.arange(len(raw)) + BUFFER
    return raw[(at ^ (at >> 7 & bits) << 4) - BUFFER]


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("at", [(0, 0), (8, 3), (-3, -2), (40, 18), (100, 0)])
def test_box_of_a_matrix(at, swizzle, options):
    source = np.random.default_rng(0).integers(0, 65536, (20, 48)).astype(np.uint16)
    box = (min(64, (swizzle or 64) // 2), 8)
    nbytes = 2 * box[0] * box[1]

    def made(address):
        return map_bytes(address, (48, 20), (96,), box, swizzle=swizzle)

    out, _ = run(load_box(2, at, nbytes), source, made, **options)
    got = unswizzle(out[:nbytes], swizzle).view(np.uint16).reshape(box[::-1])
    assert (got == expected_box(source, at, box)).all()


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_every_rank(rank):
    sizes = (16, 3, 4, 2, 3)[:rank]
    box = (8, 2, 3, 1, 2)[:rank]
    at = (4, 1, -1, 1, 2)[:rank]
    source = np.random.default_rng(rank).integers(0, 65536, sizes[::-1]).astype(np.uint16)
    strides = [2 * int(np.prod(sizes[: d + 1])) for d in range(rank - 1)]
    nbytes = 2 * int(np.prod(box))
    out, _ = run(load_box(rank, at, nbytes), source, lambda a: map_bytes(a, sizes, strides, box))
    assert (out[:nbytes].view(np.uint16).reshape(box[::-1]) == expected_box(source, at, box)).all()


STORE = """
    {ready}
    shl.b32 %r0, %t, 4;
    add.u32 %r1, %r0, 2048;
    st.shared.v4.b32 [%r1], {{%t, %t, %r0, %r1}};
    {fence}
    bar.sync 0;
    @!%first bra rest;
    {copy}
    cp.async.bulk.commit_group;
    {wait}
    rest:
"""
FENCE = "fence.proxy.async.shared::cta;"
BOX = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {40, 15}], [2048];"


def words() -> np.ndarray:
    t = np.arange(64, dtype=np.uint32)
    return np.stack([t, t, 16 * t, 16 * t + 2048], axis=1)


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_stores_leave_out_what_lies_outside(options):
    source = np.full((20, 48), 9, np.uint16)
    code = STORE.format(ready=READY, fence=FENCE, copy=BOX, wait="cp.async.bulk.wait_group.read 0;")
    _, after = run(code, source, lambda a: map_bytes(a, (48, 20), (96,), (32, 16)), **options)
    block = words().reshape(-1).view(np.uint16).reshape(16, 32)
    source[15:20, 40:48] = block[:5, :8]
    assert (after.reshape(20, 48) == source).all()


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_consecutive_bytes_both_ways(options):
    source = np.random.default_rng(1).integers(0, 256, 512).astype(np.uint8)
    load = f"""
    {READY}
    @!%first bra rest;
    mbarrier.arrive.expect_tx.shared.b64 _, [%b], 512;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [{BUFFER}], [%in], 512, [%b];
    rest: {wait(0)} {dump(512)}
    """
    out, _ = run(load, source, **options)
    assert (out[:512] == source).all()
    copy = "cp.async.bulk.global.shared::cta.bulk_group [%out], [2048], 1024;"
    code = STORE.format(ready="", fence=FENCE, copy=copy, wait="cp.async.bulk.wait_group 0;")
    out, _ = run(code, source, **options)
    assert (out[:1024].view(np.uint32).reshape(64, 4) == words()).all()


@pytest.mark.parametrize("kind, dtype", [("u32", np.uint32), ("s32", np.int32), ("f32", np.float32)])
@pytest.mark.parametrize("name, function", [("add", np.add), ("max", np.maximum), ("min", np.minimum)])
def test_reductions(name, function, kind, dtype):
    source = np.random.default_rng(2).integers(0, 1 << 30, 256).astype(np.uint32).view(dtype)
    copy = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}.{kind} [%in], [2048], 1024;"
    code = STORE.format(ready="", fence=FENCE, copy=copy, wait="cp.async.bulk.wait_group 0;")
    _, after = run(code, source)
    assert (after == function(source, words().reshape(-1).view(dtype))).all()


def test_box_reduction_takes_the_maps_type():
    source = np.random.default_rng(3).normal(size=(16, 16)).astype(np.float32)
    copy = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%map, {0, 0}], [2048];"
    code = STORE.format(ready="", fence=FENCE, copy=copy, wait="cp.async.bulk.wait_group.read 0;")
    _, after = run(code, source, lambda a: map_bytes(a, (16, 16), (64,), (16, 16), "f32"))
    assert (after.reshape(16, 16) == source + words().reshape(-1).view(np.float32).reshape(16, 16)).all()


def matrix(address: int) -> bytes:
    return map_bytes(address, (48, 20), (96,), (32, 8))


SOURCE = np.arange(960, dtype=np.uint16).reshape(20, 48)
LOAD = load_box(2, (0, 0), 512)


@pytest.mark.parametrize(
    ("before", "after", "error", "words"),
    [
        ("_, [%b], 512;", "_, [%b], 496;", EmulatorError, "nothing can run|reach mbarrier"),
        ("_, [%b], 512;", "_, [%b], 528;", EmulatorError, "nothing can run"),
        (wait(0), "", (DataRace, UninitializedRead), "copy that signals mbarrier 0x400|never written"),
        (wait(0), wait(1), (DataRace, UninitializedRead, Deadlock), "that signals|never written|can run"),
        ("fence.mbarrier_init.release.cluster;", "", DataRace, "without a fence after its initialisation"),
        ("[2048], [%map", "[2064], [%map", Misaligned, "0x810 is not a multiple of 128"),
        ("[2048], [%map", "[9088], [%map", OutOfBounds, "touches shared"),
        ("tensor.2d", "tensor.3d", UnmodelledInstruction, "coordinates other than 3"),
        ("complete_tx::bytes [2048]", "complete_tx::bytes.im2col [2048]", UnmodelledInstruction, "im2col"),
    ],
)  # fmt: skip
def test_what_goes_wrong_with_a_load(before, after, error, words):
    assert before in LOAD
    run(LOAD, SOURCE, matrix)
    for options in ({}, {"asynchrony": "late"}):
        with pytest.raises(error, match=words):
            run(LOAD.replace(before, after), SOURCE, matrix, **options)


def test_leaving_before_a_copy_has_come():
    code = LOAD[: LOAD.index("rest:")] + "rest:"
    with pytest.raises(EmulatorError, match="exits while a copy into it is under way"):
        run(code, SOURCE, matrix, asynchrony="late")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fence": ""}, DataRace, "no fence.proxy.async between"),
        ({"wait": ""}, EmulatorError, "exits while a copy out of its shared memory is under way"),
        ({"wait": "st.shared.b32 [2048], 1;"}, DataRace, "the read of bulk 0, which nobody has waited for"),
        ({"copy": "bar.warp.sync 1;" + BOX.replace("2048", "4096")}, UninitializedRead, "was never written"),
    ],
)  # fmt: skip
def test_what_goes_wrong_with_a_store(change, error, words):
    whole = {"ready": READY, "fence": FENCE, "copy": BOX, "wait": "cp.async.bulk.wait_group.read 0;"}
    with pytest.raises(error, match=words):
        run(STORE.format(**(whole | change)), SOURCE.copy(),
            lambda a: map_bytes(a, (48, 20), (96,), (32, 16)), asynchrony="late")  # fmt: skip


def test_reading_the_source_is_less_than_arriving():
    """After wait_group.read another CTA may still see the old bytes; after wait_group it may not."""
    copy = "cp.async.bulk.global.shared::cta.bulk_group [%out], [2048], 1024;"
    for how, seen in (("wait_group.read", 0), ("wait_group", 63)):
        tail = f"cp.async.bulk.{how} 0;\nld.global.b32 %r3, [%out+1008];\nst.global.b32 [%in], %r3;"
        code = STORE.format(ready="", fence=FENCE, copy=copy, wait=tail)
        _, after = run(code, np.full(4, 77, np.uint32), asynchrony="late", races=seen > 0)
        assert after[0] == seen
        if not seen:
            with pytest.raises(DataRace, match="the write of a bulk copy"):
                run(code, np.full(4, 77, np.uint32))


def test_the_tensor_must_lie_in_memory():
    with pytest.raises(OutOfBounds, match="a tensor copy at"):
        run(LOAD, SOURCE[:5], matrix)


def test_maps_that_nobody_has_seen_are_refused():
    raw = bytearray(map_bytes(4096, (48, 20), (96,), (32, 8)))
    assert decode(bytes(raw)).box == (32, 8)
    for at, value, words in ((10, 1 << 2 | 1 << 3, "flags"), (9, 0x06, "element format"), (52, 1, "strides")):
        wrong = bytearray(raw)
        wrong[at] = value
        with pytest.raises((UnmodelledInstruction, EmulatorError), match=words):
            decode(bytes(wrong))
    with pytest.raises(EmulatorError, match="does not fit a swizzle of 32 bytes"):
        decode(map_bytes(4096, (48, 20), (96,), (32, 8), swizzle=32))


def test_a_copy_in_a_later_phase_is_not_mistaken_for_this_one():
    code = f"""
    {READY}
    @!%first bra rest;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [{BUFFER}], [%in], 512, [%b];
    mbarrier.arrive.shared.b64 _, [%b];
    rest: {wait(0)}
    {wait(1, "second")}
    """
    with pytest.raises(BarrierError, match="issued in phase 0 reach mbarrier 0x400 .phase 1"):
        run(code, np.zeros(512, np.uint8), asynchrony="late")
