"""Threads that poll: they let others go first, and what is under way happens; who works is not disturbed."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import Deadlock
from cute_flash.emulator.execution import polling

from .evaluate import aligned, launch, module

HEAD = """
    .reg .b32 %t, %c, %r<9>;
    .reg .b64 %flag, %out, %a;
    .reg .pred %p, %first;
    mov.u32 %t, %tid.x;
    mov.u32 %c, %ctaid.x;
    ld.param.u64 %flag, [flag];
    ld.param.u64 %out, [out];
    setp.eq.u32 %first, %t, 0;
"""
PARAMS = ".param .u64 flag, .param .u64 out"
ORDERS = [
    {"asynchrony": mode, "schedule": schedule, "seed": seed}
    for mode, schedule, seed in (
        ("eager", "lockstep", 0), ("eager", "random", 1), ("late", "lockstep", 2), ("late", "random", 3)
    )
]  # fmt: skip
# CTA 0 waits for a flag that the last CTA sets after work of `turns` turns of a loop.
FLAG = """
    setp.eq.u32 %p, %c, 0;
    @!%p bra work;
    poll: ld.acquire.gpu.global.u32 %r0, [%flag];
    setp.eq.u32 %p, %r0, 0;
    @%p bra poll;
    bra done;
    work: mov.u32 %r1, 0;
    more: add.u32 %r1, %r1, 1;
    setp.lt.u32 %p, %r1, {turns};
    @%p bra more;
    st.release.gpu.global.u32 [%flag], %r1;
    done: mad.wide.u32 %a, %c, 4, %out;
    @%first st.global.u32 [%a], %r0;
"""


def decisions(monkeypatch) -> list[int]:
    """Counts the scheduling decisions of the runs from now on: a list whose length that is."""
    seen: list[int] = []
    decided = polling.Polling.decided
    monkeypatch.setattr(
        polling.Polling, "decided", lambda self, going: (seen.append(len(going)), decided(self, going))[1]
    )
    return seen


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_flag_of_another_cta(options, monkeypatch):
    taken = decisions(monkeypatch)
    flag, out = np.zeros(1, np.uint32), np.zeros(2, np.uint32)
    code = FLAG.format(turns=300).replace("@%first st.global.u32 [%a], %r0;", "")
    launch(module(HEAD + code, PARAMS), [flag, out], grid=2, **options)
    assert flag[0] == 300
    assert len(taken) < 1500


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_copy_that_is_polled_for(options, monkeypatch):
    """An mbarrier's test_wait does not wait: without the copy it would be asked for ever."""
    taken = decisions(monkeypatch)
    code = """
        .reg .b32 %bar;
        mov.b32 %bar, 1024;
        @%first mbarrier.init.shared.b64 [%bar], 1;
        @%first fence.mbarrier_init.release.cluster;
        bar.sync 0;
        @!%first bra poll;
        mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 128;
        mov.b32 %r1, 1152;
        cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%flag], 128, [%bar];
        poll: mbarrier.test_wait.parity.shared.b64 %p, [%bar], 0;
        @!%p bra poll;
        mad.lo.u32 %r2, %t, 4, 1152;
        ld.shared.u32 %r3, [%r2];
        mad.wide.u32 %a, %t, 4, %out;
        st.global.u32 [%a], %r3;
    """
    source, out = aligned(np.arange(32, dtype=np.uint32)), aligned(np.zeros(32, np.uint32))
    launch(module(HEAD + code, PARAMS, "sm_90a"), [source, out], shared=1024, races=True, **options)
    assert (out == source).all()
    assert len(taken) < 1000


@pytest.mark.parametrize("spinning", [20000, 500])
def test_work_is_not_taken_for_polling(spinning, monkeypatch):
    """A late copy stays under way while its threads count, until they have for very long."""
    monkeypatch.setattr(polling, "SPINNING", spinning)
    code = """
        .reg .b32 %s;
        mul.lo.u32 %s, %t, 4;
        mad.wide.u32 %a, %t, 4, %flag;
        cp.async.ca.shared.global [%s], [%a], 4;
        .reg .b32 %bar;
        mov.b32 %bar, 512;
        @%first mbarrier.init.shared.b64 [%bar], 32;
        bar.sync 0;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%bar];
        mov.u32 %r1, 0;
        more: add.u32 %r1, %r1, 1;
        setp.lt.u32 %p, %r1, 3000;
        @%p bra more;
        ld.shared.u32 %r0, [%s];
        mad.wide.u32 %a, %t, 4, %out;
        st.global.u32 [%a], %r0;
        poll: mbarrier.test_wait.parity.shared.b64 %p, [%bar], 0;
        @!%p bra poll;
        ld.shared.u32 %r2, [%s];
        st.global.u32 [%a+128], %r2;
    """
    source, out = aligned(np.arange(32, dtype=np.uint32)), np.zeros(64, np.uint32)
    launch(module(HEAD + code, PARAMS), [source, out], shared=1024, asynchrony="late")
    assert (out[:32] == (source if spinning == 500 else 0xFFFFFFFF)).all()
    assert (out[32:] == source).all()


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_flag_that_nobody_sets(options, monkeypatch):
    monkeypatch.setattr(polling, "ENDLESS", 200)
    flag, out = np.zeros(1, np.uint32), np.zeros(2, np.uint32)
    with pytest.raises(Deadlock, match="polls, as all who can run, for what nobody will bring, PTX line"):
        launch(module(HEAD + FLAG.format(turns=1), PARAMS), [flag, out], grid=1, **options)


# CTAs append their numbers to a list of `out`, each in its turn: CTA c waits until `flag` is its turn.
RELAY = """
    {turn}
    poll: ld.acquire.gpu.global.u32 %r0, [%flag];
    setp.ne.u32 %p, %r0, %r1;
    @%p bra poll;
    mad.wide.u32 %a, %r0, 4, %out;
    @%first st.global.u32 [%a], %c;
    bar.warp.sync 0xffffffff;
    add.u32 %r2, %r0, 1;
    @%first st.release.gpu.global.u32 [%flag], %r2;
"""
IN_ORDER = "mov.u32 %r1, %c;"
REVERSED = "mov.u32 %r1, %nctaid.x; sub.u32 %r1, %r1, 1; sub.u32 %r1, %r1, %c;"


def relay(turn: str, places: int, options: dict) -> list[int]:
    """What 6 CTAs leave that take turns on a GPU with so many places."""
    flag, out = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    code = module(HEAD + RELAY.format(turn=turn), PARAMS)
    launch(code, [flag, out], grid=6, ctas_per_wave=places, **options)
    return out.tolist()


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_relay_in_the_order_of_the_grid_needs_one_place(options):
    for places in (1, 4, 6):
        assert relay(IN_ORDER, places, options) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_relay_in_reverse_order_needs_all_places(options, monkeypatch):
    monkeypatch.setattr(polling, "ENDLESS", 200)
    assert relay(REVERSED, 6, options) == [5, 4, 3, 2, 1, 0]
    with pytest.raises(Deadlock, match="polls(.|\n)*2 CTAs of the grid have no place: 4 hold theirs"):
        relay(REVERSED, 4, options)
