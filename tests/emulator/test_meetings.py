"""Lanes of a warp: for whom one of them arrives at an mbarrier."""

from __future__ import annotations

import pytest

from cute_flash.emulator import DataRace

from .test_mbarrier import ORDERS, READY, run, wait

# One lane arrives for its warp, when all lanes have written; the other warp then reads.
HANDED_ON = f"""
    .shared .align 4 .b8 words[128];
    @%first mbarrier.init.shared.b64 [%b], 1;
    {READY}
    mov.b32 %r0, words;
    mad.lo.u32 %r0, %l, 4, %r0;
    setp.ne.u32 %p0, %w, 0;
    @%p0 bra read;
    st.shared.b32 [%r0], %l;
    {{}}
    @%first mbarrier.arrive.shared.b64 _, [%b];
    read:
    {wait(0)}
    ld.shared.b32 %r1, [%r0];
    st.global.b32 [%out], %r1;
"""
MEETINGS = ("bar.warp.sync -1;", "bar.sync 1, 32;")


def handed_on(between: str, **options) -> list[int]:
    return run(HANDED_ON.replace("{}", between), **options).tolist()


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("meeting", MEETINGS)
def test_a_lane_that_has_met_the_others_arrives_for_them(meeting, options):
    assert handed_on(meeting, **options) == [*range(32)] * 2


def test_a_lane_that_has_not_met_the_others_arrives_for_itself():
    with pytest.raises(DataRace, match="reads shared .* the write of warp 0"):
        handed_on("")
    with pytest.raises(DataRace, match="reads shared .* the write of warp 0"):
        handed_on("bar.warp.sync -1;\nst.shared.b32 [%r0], %l;")


def test_all_lanes_arrive_for_themselves():
    code = HANDED_ON.replace("@%first mbarrier.arrive", "mbarrier.arrive").replace("[%b], 1", "[%b], 32")
    assert run(code.replace("{}", "")).tolist() == [*range(32)] * 2


def test_what_one_lane_has_done_needs_no_meeting():
    code = HANDED_ON.replace("{}", "").replace("st.shared.b32 [%r0], %l;", "@%first st.shared.b32 [%r0], 7;")
    code = code.replace("ld.shared.b32 %r1, [%r0];", "ld.shared.b32 %r1, [words];")
    assert run(code).tolist() == [7] * 64
