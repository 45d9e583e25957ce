"""Instructions of a hot loop that run only where a warp's vote says so count as often as it said so."""

from __future__ import annotations

from collections import Counter

import pytest

from profiling import cycles, sass

# A loop with a branch that a warp's vote decides; where it says no, one that it does not is in the way.
VOTING = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0010*/                   VOTE.ANY P0, P3 ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   FMUL R4, R4, R5 ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


def test_what_a_vote_decides_counts_as_often_as_it_said_so():
    (loop,) = sass.hot_loops(VOTING)
    assert loop.voted == (({4, 5}, {6, 7}),)
    assert loop.weights([0.25]) == [1, 1, 1, 1, 0.25, 0.25, 0.75, 0.75, 1]
    (turned,) = sass.hot_loops(VOTING.replace("@!P0", " @P0"))
    assert turned.voted == (({6, 7}, {4, 5}),)
    (other,) = sass.loops(VOTING.replace("MUFU.EX2 R4, R4", "ISETP.GE.AND P0, PT, R4, 0x1, PT"))
    assert other.voted == () and other.weights([]) == [1] * 9
    with pytest.raises(ValueError):
        loop.weights([])


def test_votes_of_warps_that_do_a_loop_s_work():
    """Those of other warps, or that none of a steady tile asks for, are not the loop's."""
    (loop,) = sass.hot_loops(VOTING)
    often, seldom = Counter({"ex2.approx": 4.0}), Counter({"ex2.approx": 1.0})
    votes = Counter({(10, True): 0.0, (30, True): 1.0, (30, False): 3.0}), Counter({(50, True): 8.0})
    totals = cycles.Totals((often, seldom), 0.0, 0.0, 0.0, votes=votes)
    assert cycles.agreed(loop, totals) == [0.25]
