"""Named barriers: what they order, and every way of using them wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import BarrierError, DataRace, Deadlock, UninitializedRead

from .evaluate import aligned, launch, module

HEAD = """
    .reg .b32 %t, %w, %s<9>, %r<9>;
    .reg .b64 %out, %d<9>;
    .reg .pred %p, %q;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
"""
SCHEDULES = [{"schedule": "lockstep"}, *({"schedule": "random", "seed": seed} for seed in range(4))]
# Every thread writes its word and reads the one of the thread at the other end of the CTA.
MIRROR = (
    HEAD
    + """
    ld.param.u64 %out, [out];
    shl.b32 %s0, %t, 2;
    mov.u32 %r0, %ntid.x;
    sub.u32 %r1, %r0, %t;
    sub.u32 %r1, %r1, 1;
    shl.b32 %s1, %r1, 2;
    st.shared.u32 [%s0], %t;
    {barrier}
    ld.shared.u32 %r2, [%s1];
    mad.wide.u32 %d0, %t, 4, %out;
    st.global.u32 [%d0], %r2;
"""
)


def mirror(barrier: str, block: int = 128, **options) -> list[int]:
    target = aligned(np.zeros(block, np.uint32))
    text = module(MIRROR.replace("{barrier}", barrier), ".param .u64 out")
    launch(text, [target], block=block, shared=4 * block, **options)
    return target.tolist()


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.sync 5, 128;",
        "barrier.sync 3;",
        "barrier.cta.sync.aligned 15, 128;",
        "bar.cta.sync 1;",
    ],
)
def test_everybody_waits(barrier, options):
    assert mirror(barrier, races=True, **options) == list(range(128))[::-1]


def test_without_the_barrier_somebody_notices():
    """Lockstep order hides a missing barrier from the values, not from the race detector; random order
    shows it.
    """
    assert mirror("") == list(range(128))[::-1]
    with pytest.raises(DataRace):
        mirror("", races=True)
    with pytest.raises(UninitializedRead):
        mirror("", schedule="random")


PRODUCER = (
    HEAD
    + """
    ld.param.u64 %out, [out];
    mov.u32 %r7, 0;
    setp.ge.u32 %p, %t, 32;
    @%p bra CONSUMER;
    PRODUCE:
    bar.sync 1, 64;
    mad.lo.u32 %r0, %r7, 100, %t;
    shl.b32 %s0, %t, 2;
    st.shared.u32 [%s0], %r0;
    bar.arrive 2, 64;
    add.u32 %r7, %r7, 1;
    setp.lt.u32 %q, %r7, 5;
    @%q bra PRODUCE;
    bra DONE;
    CONSUMER:
    bar.arrive 1, 64;
    CONSUME:
    bar.sync 2, 64;
    sub.u32 %r1, 63, %t;
    shl.b32 %s0, %r1, 2;
    ld.shared.u32 %r0, [%s0];
    mad.lo.u32 %r2, %r7, 32, %r1;
    mad.wide.u32 %d0, %r2, 4, %out;
    st.global.u32 [%d0], %r0;
    add.u32 %r7, %r7, 1;
    setp.lt.u32 %q, %r7, 5;
    @!%q bra DONE;
    bar.arrive 1, 64;
    bra CONSUME;
    DONE:
"""
)


@pytest.mark.parametrize("options", SCHEDULES)
def test_producer_and_consumer(options):
    target = aligned(np.zeros(160, np.uint32))
    text = module(PRODUCER, ".param .u64 out")
    launch(text, [target], block=64, shared=128, races=True, **options)
    assert (target.reshape(5, 32) == np.arange(5)[:, None] * 100 + np.arange(32)).all()


@pytest.mark.parametrize(
    "gone", ["bar.sync 1, 64;", "bar.arrive 2, 64;", "bar.sync 2, 64;", "bar.arrive 1, 64;\n    CON"]
)
def test_each_removed_barrier_is_noticed(gone):
    text = PRODUCER.replace(gone, gone[gone.index("\n") :] if "\n" in gone else "")
    assert text != PRODUCER
    with pytest.raises((DataRace, Deadlock, BarrierError)):
        launch(
            module(text, ".param .u64 out"),
            [aligned(np.zeros(160, np.uint32))],
            block=64,
            shared=128,
            races=True,
        )


@pytest.mark.parametrize("options", SCHEDULES)
def test_reductions(options):
    target = aligned(np.zeros(96 * 3, np.uint32))
    code = (
        HEAD
        + """
        ld.param.u64 %out, [out];
        setp.lt.u32 %p, %t, 50;
        barrier.red.popc.u32 %r0, 0, %p;
        bar.red.and.pred %q, 1, !%p;
        selp.u32 %r1, 1, 0, %q;
        bar.red.or.pred %q, 2, 96, %p;
        selp.u32 %r2, 1, 0, %q;
        mad.wide.u32 %d0, %t, 12, %out;
        st.global.u32 [%d0], %r0;
        st.global.u32 [%d0+4], %r1;
        st.global.u32 [%d0+8], %r2;
    """
    )
    launch(module(code, ".param .u64 out"), [target], block=96, **options)
    assert (target.reshape(96, 3) == [50, 0, 1]).all()


@pytest.mark.parametrize("options", SCHEDULES)
def test_exited_warps(options):
    """A barrier of all threads is released when those that are missing exit; one with a count is not."""
    code = (
        HEAD
        + """
        setp.eq.u32 %p, %w, {first};
        @%p ret;
        {barrier}
    """
    )
    for first in (0, 2):
        text = module(code.replace("{first}", str(first)).replace("{barrier}", "bar.sync 0;"))
        launch(text, [], block=96, **options)
        text = module(code.replace("{first}", str(first)).replace("{barrier}", "bar.sync 0, 96;"))
        with pytest.raises(Deadlock, match="64 of 96 threads arrived"):
            launch(text, [], block=96, **options)


def test_exited_lanes_do_not_hold_up_their_warp():
    code = HEAD + "and.b32 %r0, %t, 3;\nsetp.eq.u32 %p, %r0, 0;\n@%p ret;\nbar.sync 0;\nbar.sync 1, 64;"
    launch(module(code), [], block=64)


@pytest.mark.parametrize("options", SCHEDULES)
def test_lanes_that_exit_while_the_others_wait_for_them(options):
    code = """
        and.b32 %r0, %t, 3;
        setp.eq.u32 %p, %r0, 0;
        @%p bra LEAVE;
        bar.sync 0;
        shfl.sync.idx.b32 %r1, %t, 1, 31, 0xeeeeeeee;
        bra DONE;
        LEAVE: ret;
        DONE:
    """
    launch(module(HEAD + code), [], block=64, **options)


def test_a_warp_that_arrives_in_parts():
    """Both halves of a divergent warp reach the barrier one after the other: it counts them as one warp."""
    code = (
        HEAD
        + """
        setp.lt.u32 %p, %t, 40;
        @%p bra JOIN;
        add.u32 %t, %t, 1;
        JOIN: barrier.sync 0;
    """
    )
    launch(module(code), [], block=64)


@pytest.mark.parametrize("options", SCHEDULES)
def test_more_warps_than_a_phase_takes(options):
    """Four warps at a barrier for two make two phases; a third one alone waits for ever."""
    launch(module(HEAD + "bar.sync 1, 64;"), [], block=128, **options)
    with pytest.raises(Deadlock, match="32 of 64 threads arrived"):
        launch(module(HEAD + "bar.sync 1, 64;"), [], block=96, **options)


def test_phases_may_have_different_counts():
    code = """
        setp.lt.u32 %p, %w, 2;
        @%p bar.sync 1, 64;
        bar.sync 1, 96;
        bar.sync 1;
    """
    launch(module(HEAD + code), [], block=96)


# Misuse.


def fails(code: str, error: type[Exception], match: str, block: int = 64, **options) -> None:
    with pytest.raises(error, match=match):
        launch(module(HEAD + code), [], block=block, **options)


def test_deadlock_names_who_waits_for_what():
    code = """
        setp.eq.u32 %p, %w, 0;
        @%p bra FIRST;
        bar.sync 7;
        bra DONE;
        FIRST: bar.sync 8, 64;
        DONE:
    """
    with pytest.raises(Deadlock) as caught:
        launch(module(HEAD + code), [], block=64)
    text = str(caught.value)
    assert "CTA (0, 0, 0) warps [1] wait at barrier 7 (32 of 64 threads arrived)" in text
    assert "CTA (0, 0, 0) warps [0] wait at barrier 8 (32 of 64 threads arrived)" in text
    assert "bar.sync 8, 64" in text and "bar.sync 7" in text


def test_half_a_warp_at_an_aligned_barrier():
    code = "setp.lt.u32 %p, %t, 16;\n@%p bra LOW;\nbar.sync 0;\nbra DONE;\nLOW: bar.sync 0;\nDONE:"
    fails(code, Deadlock, "wait for the warp's other lanes", block=32)


@pytest.mark.parametrize("count", ["33", "0", "16", "96"])
def test_wrong_counts(count):
    fails(f"bar.sync 0, {count};", BarrierError, "not a multiple of 32 from 32 to 64")


def test_wrong_number():
    fails("bar.sync 16;", BarrierError, "16 is not one of 0 to 15")


def test_different_counts_in_one_phase():
    code = "setp.eq.u32 %p, %w, 0;\nselp.u32 %r0, 64, 96, %p;\nbar.sync 1, %r0;"
    fails(code, BarrierError, "expects (64|96) threads in this phase, not (64|96)", block=96)
    fails(code, BarrierError, "expects", block=96, schedule="random")


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_warp_that_goes_on_may_arrive_again(options):
    """Hardware counts arrivals, whoever makes them: warps that take turns begin with one of their own."""
    code = "setp.eq.u32 %p, %w, 1;\n@%p bra DONE;\nbar.arrive 1, 64;\nbar.sync 1, 64;\nDONE:"
    launch(module(HEAD + code), [], block=64, **options)
    fails(code.replace("bar.arrive 1, 64;\n", ""), Deadlock, "32 of 64 threads arrived")


def test_reduction_and_sync_in_one_phase():
    code = """
        setp.eq.u32 %p, %w, 0;
        @%p bra FIRST;
        bar.sync 1, 64;
        bra DONE;
        FIRST: bar.red.popc.u32 %r0, 1, 64, %p;
        DONE:
    """
    fails(code, BarrierError, "used by a reduction and by sync")


def test_lanes_that_name_different_barriers():
    fails("and.b32 %r0, %t, 1;\nbar.sync %r0;", BarrierError, "lanes of one warp name different")
