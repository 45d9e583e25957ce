"""cp.async: what it copies, when it lands, and what happens to those who do not wait."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_flash.emulator import (
    DataRace,
    Deadlock,
    Misaligned,
    OutOfBounds,
    UninitializedRead,
    UnmodelledInstruction,
)

from .evaluate import aligned, launch, module

HEAD = """
    .reg .b32 %t, %s<9>, %r<9>;
    .reg .b64 %in, %out, %d<9>;
    .reg .pred %p;
    mov.u32 %t, %tid.x;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
"""
PARAMS = ".param .u64 in, .param .u64 out"
MODES = [{"asynchrony": mode, "schedule": schedule, "seed": seed} for mode, schedule, seed in (
    ("eager", "lockstep", 0), ("late", "lockstep", 0), ("late", "random", 1), ("random", "random", 2),
    ("random", "lockstep", 3))]  # fmt: skip


def run(
    code: str, source: np.ndarray, target: np.ndarray, shared: int, block: int = 32, **options
) -> np.ndarray:
    launch(module(HEAD + code, PARAMS), [source, target], block=block, shared=shared, **options)
    return target


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes_and_zero_fill(size, options):
    """Thread t copies t % (size + 1) bytes; the rest of its place becomes zero."""
    source = aligned(np.random.default_rng(0).integers(1, 256, 32 * size, dtype=np.uint8))
    kind, registers = {
        4: ("b32", "%r1"),
        8: ("v2.b32", "{%r1, %r2}"),
        16: ("v4.b32", "{%r1, %r2, %r3, %r4}"),
    }[size]
    code = f"""
        rem.u32 %r0, %t, {size + 1};
        mul.lo.u32 %s0, %t, {size};
        mad.wide.u32 %d0, %t, {size}, %in;
        mad.wide.u32 %d1, %t, {size}, %out;
        cp.async.ca.shared.global.L2::128B [%s0], [%d0], {size}, %r0;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.{kind} {registers}, [%s0];
        st.global.{kind} [%d1], {registers};
    """
    target = run(code, source, aligned(np.zeros_like(source)), 32 * size, races=True, **options)
    inside = np.arange(size) < (np.arange(32) % (size + 1))[:, None]
    assert (target.reshape(32, size) == np.where(inside, source.reshape(32, size), 0)).all()


def test_ignore_predicate_and_bypass():
    source = aligned(np.arange(1, 129, dtype=np.uint32))
    code = """
        and.b32 %r0, %t, 1;
        setp.eq.u32 %p, %r0, 1;
        mul.lo.u32 %s0, %t, 16;
        mad.wide.u32 %d0, %t, 16, %in;
        mad.wide.u32 %d1, %t, 16, %out;
        cp.async.cg.shared::cta.global [%s0], [%d0], 16, %p;
        cp.async.wait_all;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%s0];
        st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};
    """
    target = run(code, source, aligned(np.zeros_like(source)), 512, asynchrony="late")
    assert (target.reshape(32, 4) == np.where(np.arange(32)[:, None] % 2, 0, source.reshape(32, 4))).all()


# Four groups of one word per thread; after wait_group n the words of the first 4 - n are read.
GROUPS = """
    mul.lo.u32 %s0, %t, 16;
    mad.wide.u32 %d0, %t, 16, %in;
    mad.wide.u32 %d1, %t, 16, %out;
    cp.async.ca.shared.global [%s0], [%d0], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%s0+4], [%d0+4], 4;
    cp.async.commit_group;
    cp.async.commit_group;
    cp.async.ca.shared.global [%s0+8], [%d0+8], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%s0+12], [%d0+12], 4;
    {wait}
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%s0];
    st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};
    cp.async.wait_all;
"""


@pytest.mark.parametrize(
    ("wait", "landed"),
    [("", 0), ("cp.async.wait_group 4;", 0), ("cp.async.wait_group 3;", 1), ("cp.async.wait_group 2;", 2),
     ("cp.async.wait_group 1;", 2), ("cp.async.wait_group 0;", 3), ("cp.async.wait_all;", 4)],
)  # fmt: skip
def test_late_copies_land_when_waited_for(wait, landed):
    source = aligned(np.arange(1, 129, dtype=np.uint32))
    code = GROUPS.replace("{wait}", wait)
    late = run(code, source, aligned(np.zeros_like(source)), 512, asynchrony="late").reshape(32, 4)
    assert (late[:, :landed] == source.reshape(32, 4)[:, :landed]).all()
    assert (late[:, landed:] == 0xFFFFFFFF).all()
    eager = run(code, source, aligned(np.zeros_like(source)), 512)
    assert (eager == source).all()
    if landed < 4:
        for mode in ("eager", "late"):
            with pytest.raises(DataRace, match="still under way"):
                run(code, source, aligned(np.zeros_like(source)), 512, races=True, asynchrony=mode)
    else:
        run(code, source, aligned(np.zeros_like(source)), 512, races=True)


def test_late_copies_read_global_memory_late():
    """Whoever changes the source before the wait changes what is copied; eager copies have it already."""
    code = """
        mul.lo.u32 %s0, %t, 4;
        mad.wide.u32 %d0, %t, 4, %in;
        cp.async.ca.shared.global [%s0], [%d0], 4;
        st.global.u32 [%d0], 7;
        cp.async.wait_all;
        ld.shared.u32 %r0, [%s0];
        mad.wide.u32 %d1, %t, 4, %out;
        st.global.u32 [%d1], %r0;
    """
    for mode, expected in (("eager", 3), ("late", 7)):
        source = aligned(np.full(32, 3, np.uint32))
        assert (run(code, source, aligned(np.zeros(32, np.uint32)), 128, asynchrony=mode) == expected).all()


def test_random_asynchrony_is_in_between():
    source = aligned(np.arange(1, 129, dtype=np.uint32))
    code = GROUPS.replace("{wait}", "")
    seen = set()
    for seed in range(12):
        got = run(code, source, aligned(np.zeros_like(source)), 512, asynchrony="random", seed=seed)
        seen.add(tuple((got.reshape(32, 4)[0] != 0xFFFFFFFF).tolist()))
    assert len(seen) > 4


# A tile that one warp loads and another one reads.
TILE = """
    setp.ge.u32 %p, %t, 32;
    @%p bra READ;
    mul.lo.u32 %s0, %t, 4;
    mad.wide.u32 %d0, %t, 4, %in;
    cp.async.ca.shared.global [%s0], [%d0], 4;
    cp.async.commit_group;
    {wait}
    READ:
    {barrier}
    sub.u32 %r0, 63, %t;
    min.u32 %r0, %r0, 31;
    mul.lo.u32 %s1, %r0, 4;
    ld.shared.u32 %r1, [%s1];
    mad.wide.u32 %d1, %t, 4, %out;
    st.global.u32 [%d1], %r1;
    cp.async.wait_all;
"""


@pytest.mark.parametrize("mode", ["eager", "late", "random"])
def test_wait_and_barrier_are_both_needed(mode):
    source, wait, barrier = aligned(np.arange(32, dtype=np.uint32)), "cp.async.wait_group 0;", "bar.sync 0;"

    def tile(wait: str, barrier: str) -> np.ndarray:
        code = TILE.replace("{wait}", wait).replace("{barrier}", barrier)
        return run(code, source, aligned(np.zeros(64, np.uint32)), 128, 64, races=True, asynchrony=mode)

    assert tile(wait, barrier)[32:].tolist() == list(range(32))[::-1]
    with pytest.raises(DataRace, match="still under way"):
        tile("", barrier)
    with pytest.raises((DataRace, UninitializedRead)):
        tile(wait, "")
    with pytest.raises(DataRace, match="still under way"):
        tile("cp.async.wait_group 1;", barrier)


def test_copying_over_what_another_warp_still_reads():
    code = """
        mul.lo.u32 %s0, %t, 4;
        setp.ge.u32 %p, %t, 32;
        @!%p st.shared.u32 [%s0], %t;
        bar.sync 0;
        @%p ld.shared.u32 %r0, [%s0+-128];
        {barrier}
        mad.wide.u32 %d0, %t, 4, %in;
        @!%p cp.async.ca.shared.global [%s0], [%d0], 4;
        cp.async.wait_all;
    """
    source = aligned(np.zeros(32, np.uint32))
    run(code.replace("{barrier}", "bar.sync 0;"), source, source, 256, 64, races=True)
    with pytest.raises(DataRace, match="copies to .* the read of warp 1"):
        run(code.replace("{barrier}", ""), source, source, 256, 64, races=True)


def test_checks_happen_at_issue():
    data = aligned(np.zeros(64, np.uint8))
    code = """
        ld.param.u64 %d0, [out];
        ld.param.u32 %s0, [where];
        ld.param.u32 %r0, [size];
        add.s64 %d0, %in, %d0;
        cp.async.cg.shared.global [%s0], [%d0], 16, %r0;
        cp.async.wait_all;
    """

    def copy(source: int, shared: int, size: int) -> None:
        scalars = struct.pack("<qII", source, shared, size)
        text = module(HEAD + code, PARAMS + ", .param .u32 where, .param .u32 size")
        launch(text, [data], block=1, shared=64, scalars=scalars, asynchrony="late")

    copy(48, 48, 16)
    copy(64, 0, 0)
    copy(4096, 0, 0)
    for bad in ((64, 0, 16), (-16, 0, 4)):
        with pytest.raises(OutOfBounds, match="p0"):
            copy(*bad)
    with pytest.raises(OutOfBounds, match="shared"):
        copy(0, 64, 16)
    for bad in ((8, 0, 16), (0, 8, 16)):
        with pytest.raises(Misaligned):
            copy(*bad)


@pytest.mark.parametrize(
    "code", ["cp.async.cg.shared.global [0], [%in], 8;", "cp.async.ca.shared.global [0], [%in], 2;"]
)
def test_sizes_that_ptx_does_not_have(code):
    with pytest.raises(UnmodelledInstruction, match="copy of"):
        run(code, aligned(np.zeros(4)), aligned(np.zeros(4)), 64)


# Two warps copy a word per thread; an mbarrier tracks the copies; thread t reads what thread 63 - t copied.
TRACKED = """
    .reg .b32 %bar;
    .reg .b64 %state;
    mov.b32 %bar, {at};
    setp.eq.u32 %p, %t, 0;
    @%p mbarrier.init.shared.b64 [%bar], {count};
    bar.sync 0;
    mad.lo.u32 %s0, %t, 4, {data};
    mul.lo.u32 %s1, %t, 4;
    sub.u32 %s1, {last}, %s1;
    mad.wide.u32 %d0, %t, 4, %in;
    mad.wide.u32 %d1, %t, 4, %out;
    cp.async.ca.shared.global [%s0], [%d0], 4;
    {arrive}
    {wait}
    ld.shared.u32 %r0, [%s1];
    st.global.u32 [%d1], %r0;
    {end}
"""
WAIT = """
    again: mbarrier.test_wait.parity.shared.b64 %p, [%bar], 0;
    @!%p bra again;
"""
NOINC = "cp.async.mbarrier.arrive.noinc.shared.b64 [%bar];"
COUNTED = "cp.async.mbarrier.arrive.shared::cta.b64 [%bar];\nmbarrier.arrive.shared.b64 %state, [%bar];"


def tracked(arrive: str, wait: str = WAIT, count: int = 64, end: str = "", target: str = "sm_80", **options):
    """(what was copied, what was read)."""
    source, target_array = aligned(np.arange(1, 65, dtype=np.uint32)), aligned(np.zeros(96, np.uint32))
    at, data = (1024, 0) if target == "sm_80" else (2048, 1024)
    code = HEAD + TRACKED.format(
        at=at, data=data, last=data + 63 * 4, count=count, arrive=arrive, wait=wait, end=end
    )
    arrays = [source, target_array]
    options = {"races": True, **options}
    launch(module(code, PARAMS, target), arrays, block=64, shared=2048, **options)
    return source, target_array[63::-1]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("arrive", [NOINC, COUNTED])
def test_an_mbarrier_tracks_copies(arrive, options):
    for races in (True, False):
        source, got = tracked(arrive, races=races, **options)
        assert (got == source).all()


def test_what_an_arrival_follows():
    """A copy that nobody waits for, and one behind the arrival, may still be under way."""
    with pytest.raises(DataRace, match="the copy of warp 1 that an mbarrier tracks|without an order"):
        tracked(NOINC, wait="")
    late = f"{NOINC}\ncp.async.ca.shared.global [%s0+512], [%d0], 4;"
    read = WAIT + "add.u32 %s1, %s1, 512;"
    with pytest.raises(DataRace, match="still under way there"):
        tracked(late, wait=read)
    _, got = tracked(late, wait=read, races=False, asynchrony="late")
    assert (got == 0xFFFFFFFF).all()


def test_an_arrival_speaks_for_the_copies_alone():
    """What its thread has stored before is not made known; an arrival of the thread itself does that."""
    store = "st.shared.u32 [%s0+512], %t;"
    read = WAIT + "ld.shared.u32 %r1, [%s1+512];"
    with pytest.raises(DataRace, match="without an order to the write of warp"):
        tracked(store + NOINC, wait=read)
    tracked(store + COUNTED, wait=read)


def test_the_count_of_an_mbarrier_that_tracks_copies():
    """.noinc takes an arrival of the count; without it the phase waits for one more, and that is all."""
    with pytest.raises(Deadlock, match="wait for mbarrier"):
        tracked(NOINC, count=65, wait=WAIT.replace("test_wait", "try_wait"))
    alone = "cp.async.mbarrier.arrive.shared.b64 [%bar];"
    once = "@%p mbarrier.arrive.shared.b64 %state, [%bar];"
    source, got = tracked(alone + "bar.sync 0;" + once, count=1)
    assert (got == source).all()


def test_units_that_read_what_was_copied_need_a_proxy_fence():
    """cp.async writes through the generic proxy, whoever tells that it is over."""
    store = """
        setp.ne.u32 %p, %t, 32;
        @%p bra done;
        {fence}
        cp.async.bulk.global.shared::cta.bulk_group [%out+256], [%s2], 128;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        done:
    """
    wait = WAIT + "mov.b32 %s2, 1024;" + store
    options = {"target": "sm_90a", "end": "bar.sync 0;"}
    tracked(NOINC, wait=wait.format(fence="fence.proxy.async.shared::cta;"), **options)
    with pytest.raises(DataRace, match="that an mbarrier tracks: no fence.proxy.async between"):
        tracked(NOINC, wait=wait.format(fence=""), **options)


def test_an_mbarrier_of_another_cta_tracks_nothing():
    with pytest.raises(UnmodelledInstruction, match="shared::cluster"):
        tracked(NOINC.replace("shared", "shared::cluster"), target="sm_90a")
