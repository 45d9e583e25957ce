"""Loads, stores and atomics in every space, and the accesses that must be refused."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from cute_flash.emulator import (
    EmulatorError,
    GlobalMemory,
    Misaligned,
    OutOfBounds,
    UninitializedRead,
    UnmodelledInstruction,
)

from .evaluate import aligned, evaluate, launch, module

TID = """
    .reg .b32 %t, %s<9>, %r<9>;
    .reg .b64 %in, %out, %d<9>;
    .reg .b16 %h<9>;
    .reg .pred %p;
    mov.u32 %t, %tid.x;
"""
IN_OUT = TID + "ld.param.u64 %in, [in];\nld.param.u64 %out, [out];\n"
PARAMS = ".param .u64 in, .param .u64 out"


def copied(code: str, size: int, threads: int = 32, **options) -> np.ndarray:
    """Bytes that `code` copies from %in to %out, `size` per thread, at %d0 and %d1."""
    source = np.random.default_rng(0).integers(0, 256, size * threads, dtype=np.uint8)
    target = np.zeros_like(source)
    step = f"mad.wide.u32 %d0, %t, {size}, %in;\nmad.wide.u32 %d1, %t, {size}, %out;\n"
    launch(
        module(IN_OUT + step + code, PARAMS),
        [aligned(source), target := aligned(target)],
        block=threads,
        **options,
    )
    assert (target == source).all()
    return target


def vectors() -> list[tuple[int, int]]:
    """(bits, elements) of every vector access."""
    return [(b, v) for b in (8, 16, 32, 64) for v in (1, 2, 4) if b * v <= 128] + [(32, 8), (64, 4)]


@pytest.mark.parametrize(("bits", "count"), vectors())
@pytest.mark.parametrize("through", ["global", "shared", "local", "generic"])
def test_every_width(bits, count, through):
    size, register = bits * count // 8, f"%{ {8: 'h', 16: 'h', 32: 'r', 64: 'd'}[bits] }"
    first = 2 if bits == 64 else 0
    names = [f"{register}{k + first}" for k in range(count)]
    value = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    kind = (f".v{count}" if count > 1 else "") + f".b{bits}"
    code = f"ld.global{kind} {value}, [%d0];\n"
    if through == "shared":
        code += (
            f"mul.lo.u32 %s0, %t, {size};\nst.shared{kind} [%s0], {value};\nld.shared{kind} {value}, [%s0];\n"
        )
    elif through == "local":
        code = ".local .align 32 .b8 depot[32];\n" + code
        code += f"mov.u64 %d8, depot;\nst.local{kind} [%d8], {value};\nld.local{kind} {value}, [depot];\n"
    elif through == "generic":
        code = code.replace(".global", "")
    store = "" if through == "generic" else ".global"
    copied(code + f"st{store}{kind} [%d1], {value};", size, shared=size * 32)


@pytest.mark.parametrize(
    "hints", [".nc", ".ca", ".cg", ".L1::no_allocate.L2::128B", ".relaxed.gpu", ".volatile"]
)
def test_hints_change_nothing(hints):
    copied(f"ld.global{hints}.v4.b32 {{%r0, %r1, %r2, %r3}}, [%d0];\n"
           "st.global.cs.v4.b32 [%d1], {%r0, %r1, %r2, %r3};", 16)  # fmt: skip


def test_a_cache_policy_changes_nothing():
    copied("createpolicy.fractional.L2::evict_first.b64 %d8, 0f3F800000;\n"
           "ld.global.L2::cache_hint.v4.b32 {%r0, %r1, %r2, %r3}, [%d0], %d8;\n"
           "st.global.L2::cache_hint.v4.b32 [%d1], {%r0, %r1, %r2, %r3}, %d8;", 16)  # fmt: skip


def test_narrow_loads_extend():
    source = aligned(np.array([0x80, 0xFF, 0x7F, 1] * 8, np.uint8))
    target = aligned(np.zeros(64, np.uint32))
    code = (
        IN_OUT
        + """
        cvt.u64.u32 %d0, %t;
        add.s64 %d0, %d0, %in;
        mad.wide.u32 %d1, %t, 8, %out;
        ld.global.s8 %r0, [%d0];
        ld.global.u8 %r1, [%d0];
        st.global.v2.b32 [%d1], {%r0, %r1};
    """
    )
    launch(module(code, PARAMS), [source, target])
    assert (target[::2].view(np.int32) == source.view(np.int8)).all()
    assert (target[1::2] == source).all()


def test_a_wide_register_stores_its_low_part():
    (got,) = evaluate(
        "ld.param.u64 %address, [p1];\nmad.wide.u32 %address, %i0, 4, %address;\n"
        "st.global.b32 [%address], %a;\n"
        "ld.global.b32 %x, [%address];",
        np.arange(64, dtype=np.uint64) * 0x100000003, outputs=(np.uint32,),
    )  # fmt: skip
    assert got.tolist() == [k * 3 for k in range(64)]


def test_parameters():
    """Alignment of the parameter block, vectors and byte arrays."""
    code = (
        TID
        + """
        ld.param.u64 %out, [out];
        ld.param.u8 %h0, [small];
        cvt.u32.u16 %r0, %h0;
        ld.param.v2.b32 {%r1, %r2}, [pair+8];
        ld.param.f32 %r3, [last];
        mov.b64 %d2, pair;
        cvta.param.u64 %d2, %d2;
        ld.u32 %r4, [%d2+4];
        st.global.v4.b32 [%out], {%r0, %r1, %r2, %r3};
        st.global.b32 [%out+16], %r4;
    """
    )
    params = ".param .u64 out, .param .u8 small, .param .align 16 .b8 pair[16], .param .f32 last"
    target = aligned(np.zeros(5, np.uint32))
    scalars = struct.pack("<B7x4If", 200, 1, 2, 3, 4, 1.5)
    launch(module(code, params), [target], block=1, scalars=scalars)
    assert target[:3].tolist() == [200, 3, 4]
    assert target[3:].view(np.float32)[0] == 1.5
    assert target[4] == 2


def test_module_variables():
    """.const and .global arrays with initial values, reached by symbol and by address."""
    variables = """
        .const .align 4 .u32 table[4] = {5, 6, 7, 8};
        .global .align 8 .u64 counter = 40;
    """
    code = (
        TID
        + """
        ld.param.u64 %out, [out];
        ld.const.u32 %r0, [table+8];
        mov.u64 %d0, counter;
        atom.global.add.u64 %d1, [%d0], 1;
        ld.global.u64 %d2, [counter];
        cvt.u32.u64 %r1, %d2;
        st.global.v2.b32 [%out], {%r0, %r1};
    """
    )
    target = aligned(np.zeros(2, np.uint32))
    launch(module(code, ".param .u64 out", variables=variables), [target])
    assert target.tolist() == [7, 72]


def test_static_and_dynamic_shared_memory():
    """Dynamic shared memory begins after the static variables; on sm_90 behind the system's first KiB."""
    variables = ".shared .align 4 .b8 first[12];\n.extern .shared .align 16 .b8 rest[];"
    code = (
        TID
        + """
        ld.param.u64 %out, [out];
        mov.u32 %r0, first;
        mov.u32 %r1, rest;
        st.global.v2.b32 [%out], {%r0, %r1};
        st.shared.b32 [rest+60], %t;
    """
    )
    for target, base in (("sm_80", 0), ("sm_90a", 1024)):
        places = aligned(np.zeros(2, np.uint32))
        text = module(code, ".param .u64 out", target, variables)
        launch(text, [places], block=1, shared=64)
        assert places.tolist() == [base, base + 16]
        with pytest.raises(OutOfBounds, match="shared"):
            launch(text, [places], block=1, shared=60)


# What must be refused. Each negative case has the nearest legal access beside it.


@pytest.mark.parametrize("size", [4, 16])
def test_global_bounds(size):
    data = aligned(np.zeros(256, np.uint8))
    value = {4: ".b32 %r0", 16: ".v4.b32 {%r0, %r1, %r2, %r3}"}[size]
    kind, registers = value.split(" ", 1)
    code = IN_OUT + f"ld.param.u64 %d0, [out];\nadd.s64 %d0, %in, %d0;\nld.global{kind} {registers}, [%d0];"

    def read(offset: int) -> None:
        launch(module(code, PARAMS), [data], scalars=struct.pack("<q", offset))

    read(0)
    read(256 - size)
    for offset in (-size, 256, 256 + 64):
        with pytest.raises(OutOfBounds, match="p0") as caught:
            read(offset)
        assert f"ld.global{kind}" in str(caught.value)
        assert "CTA (0, 0, 0), warp 0, lane 0" in str(caught.value)


def test_accesses_across_allocations():
    """One instruction whose threads hit two allocations works; between them it does not."""
    block = aligned(np.arange(64, dtype=np.uint32))
    target = aligned(np.zeros(32, np.uint32))
    code = (
        IN_OUT
        + """
        mad.wide.u32 %d0, %t, 8, %in;
        mad.wide.u32 %d1, %t, 4, %out;
        ld.global.u32 %r0, [%d0];
        st.global.u32 [%d1], %r0;
    """
    )
    from cute_flash import emulator

    def run(holes: bool) -> None:
        memory = GlobalMemory()
        memory.add(block.ctypes.data, 128, "low")
        memory.add(block.ctypes.data + 128 + 16 * holes, 128 - 16 * holes, "high")
        memory.add(target.ctypes.data, target.nbytes, "target")
        params = struct.pack("<2Q", block.ctypes.data, target.ctypes.data)
        one = emulator.Launch("k", (1, 1, 1), (32, 1, 1), params=params)
        emulator.run(emulator.Program(module(code, PARAMS)), one, memory)

    run(holes=False)
    assert (target == block[::2]).all()
    with pytest.raises(OutOfBounds, match="128 bytes into low"):
        run(holes=True)


def test_an_access_over_the_end_of_one_of_several_allocations():
    from cute_flash import emulator

    block = aligned(np.zeros(64, np.uint32))
    code = IN_OUT + "mad.wide.u32 %d0, %t, 128, %in;\nld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0+16];"
    program = emulator.Program(module(code, PARAMS))
    for size in (32, 24):
        memory = GlobalMemory()
        memory.add(block.ctypes.data, 64, "low")
        memory.add(block.ctypes.data + 128, size, "high")
        one = emulator.Launch("k", (1, 1, 1), (2, 1, 1), params=struct.pack("<2Q", block.ctypes.data, 0))
        if size == 32:
            emulator.run(program, one, memory)
            continue
        with pytest.raises(OutOfBounds, match="16 bytes into high"):
            emulator.run(program, one, memory)


def test_overlapping_allocations_are_one():
    block = aligned(np.arange(64, dtype=np.uint32))
    memory = GlobalMemory()
    memory.add(block.ctypes.data, 160, "q")
    memory.add(block.ctypes.data + 96, 160, "k")
    assert [r.name for r in memory.regions] == ["q+k"]
    assert memory.regions[0].end - memory.regions[0].start == 256
    memory.add(block.ctypes.data, 0, "empty")
    assert len(memory.regions) == 1


@pytest.mark.parametrize("space", ["global", "shared"])
def test_alignment(space):
    data = aligned(np.zeros(256, np.uint8))
    base = "%in" if space == "global" else "%d8"
    code = (
        IN_OUT
        + f"""
        mov.u64 %d8, 0;
        ld.param.u64 %d1, [out];
        add.s64 %d0, {base}, %d1;
        mov.u32 %r0, 1;
        st.{space}.v2.b32 [%d0], {{%r0, %r0}};
    """
    )

    def write(offset: int) -> None:
        launch(module(code, PARAMS), [data], scalars=struct.pack("<q", offset), shared=256)

    write(8)
    for offset in (4, 1, 12):
        with pytest.raises(Misaligned, match="8 bytes at"):
            write(offset)


def test_shared_memory_that_nobody_wrote():
    code = (
        TID
        + """
        mul.lo.u32 %s0, %t, 4;
        setp.lt.u32 %p, %t, 31;
        @%p st.shared.u16 [%s0], 1;
        @%p st.shared.u16 [%s0+2], 2;
        ld.shared.b32 %r0, [%s0];
    """
    )
    with pytest.raises(
        UninitializedRead, match=r"0x7c was never written \(CTA \(0, 0, 0\), warp 0, lane 31\)"
    ):
        launch(module(code), [], shared=128)
    launch(module(code), [], shared=128, uninitialized="poison")
    launch(module(code.replace("31;", "32;")), [], shared=128)


def test_local_memory_belongs_to_its_thread():
    code = (
        IN_OUT
        + """
        .local .align 8 .b8 depot[8];
        setp.ne.u32 %p, %t, 5;
        @%p st.local.u32 [depot], %t;
        ld.local.u32 %r0, [depot];
    """
    )
    with pytest.raises(UninitializedRead, match="lane 5"):
        launch(module(code, PARAMS), [np.zeros(1), np.zeros(1)])
    with pytest.raises(OutOfBounds, match="local"):
        launch(module(code.replace("[depot];\n    ", "[depot+8];"), PARAMS), [np.zeros(1), np.zeros(1)])


def test_poison_is_nan():
    target = aligned(np.zeros(32, np.float32))
    code = (
        IN_OUT
        + """
        mul.lo.u32 %s0, %t, 4;
        mad.wide.u32 %d1, %t, 4, %in;
        ld.shared.b32 %r0, [%s0];
        st.global.b32 [%d1], %r0;
    """
    )
    launch(module(code, PARAMS), [target, target], shared=128, uninitialized="poison")
    assert np.isnan(target).all()


def test_generic_addresses_find_their_space():
    target = aligned(np.zeros(32, np.uint32))
    code = (
        IN_OUT
        + """
        .local .align 4 .b8 depot[4];
        mul.wide.u32 %d0, %t, 4;
        cvta.shared.u64 %d1, %d0;
        mov.u64 %d2, depot;
        cvta.local.u64 %d2, %d2;
        and.b32 %r1, %t, 1;
        setp.eq.u32 %p, %r1, 0;
        selp.b64 %d3, %d1, %d2, %p;
        add.u32 %r2, %t, 100;
        st.u32 [%d3], %r2;
        ld.u32 %r3, [%d3];
        isspacep.shared %p, %d3;
        @%p add.u32 %r3, %r3, 1000;
        cvta.to.shared.u64 %d4, %d1;
        mad.wide.u32 %d5, %t, 4, %in;
        st.u32 [%d5], %r3;
    """
    )
    launch(module(code, PARAMS), [target, target], shared=128)
    assert target.tolist() == [k + 100 + (1000 if k % 2 == 0 else 0) for k in range(32)]


def test_stores_into_parameters_and_unknown_spaces():
    with pytest.raises(EmulatorError, match="parameter memory"):
        launch(module("st.param.u32 [out], 1;", ".param .u64 out"), [np.zeros(1)])
    with pytest.raises(UnmodelledInstruction, match="tensor"):
        launch(module("st.tensor.u32 [0], 1;"), [])
    with pytest.raises(OutOfBounds, match="lies in no space"):
        launch(module(".reg .b64 %d;\nmov.u64 %d, 0x7fff000000000000;\nst.u32 [%d], 1;"), [])


def test_host_bytes_beside_an_allocation_stay():
    buffer = (ctypes.c_uint8 * 128)()
    array = np.frombuffer(buffer, np.uint8)
    start = -ctypes.addressof(buffer) % 16 + 4
    middle = array[start : start + 8]
    code = ".reg .b64 %d;\nld.param.u64 %d, [p];\nst.global.b32 [%d], -1;\nst.global.b32 [%d+4], -1;"
    launch(module(code, ".param .u64 p"), [middle], block=1)
    assert array[start : start + 8].tolist() == [255] * 8
    assert array.sum() == 8 * 255
