"""What the timing model hears of kernels: an event for each instruction that a warp has gone through."""

from __future__ import annotations

import pytest

from profiling.timing.trace import Recorder
from tests.emulator.test_cluster import BOTH, run

# Warps meet at one of two places, of which the emulator goes to the first before it goes on to the other.
APART = f"""
    setp.eq.u32 %p0, %rank, {{late}};
    @%p0 bra.uni late;
    {BOTH}
    bra.uni done;
late:
    {BOTH}
done:
    {BOTH}
    st.global.b32 [%out], %t;
"""


@pytest.mark.parametrize("late", [0, 1])
def test_a_wait_for_the_cluster_is_one_event(late):
    """Of the CTA that comes first, too, which looks at the barrier more than once; and a phase for each."""
    recorder = Recorder()
    run(APART.format(late=late), 1, observers=(recorder,))
    assert len(recorder.warps) == 4
    for events in recorder.warps.values():
        assert [event.word for event in events] == ["cluster arrive", "cluster wait"] * 2
        phases = [("cluster", 0, 0, 0), ("cluster", 0, 0, 1)]
        assert [event.joins for event in events[::2]] == [[phase] for phase in phases]
        assert [event.until for event in events[1::2]] == phases
    assert set(recorder.joined.values()) == {4}
