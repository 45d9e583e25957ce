"""Regions of a memory: where they begin, what may lie over what, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cute_flash.arch.common.regions import Region, Regions

STEPS = ("first", "second", "third")
A = Region(name="a", size=8, count=3, filled="first", read="second")
OVER = Region(name="over", size=4, count=3, filled="second", read="third", over="a")
B = Region(name="b", size=5, count=2, filled="first", read="third")


def made(*regions: Region, room: int | None = 34) -> Regions:
    return Regions(regions=regions, steps=STEPS, unit="columns", room=room)


def test_regions_lie_side_by_side_or_over_each_other():
    regions = made(A, OVER, B)
    taken = {
        region.name: [
            set(range(start, start + region.size))
            for start in (regions.at(region.name, i) for i in range(region.count))
        ]
        for region in regions.regions
    }
    assert all(p < s for p, s in zip(taken["over"], taken["a"], strict=True))
    own = taken["a"] + taken["b"]
    assert not any(one & other for one, other in itertools.combinations(own, 2))
    assert set().union(*own) == set(range(regions.used)) and regions.used == 34


def test_a_place_is_as_large_as_what_is_largest_there():
    regions = made(A, replace(OVER, size=20), B, room=None)
    assert [regions.at(name, 1) for name in ("a", "over", "b")] == [20, 20, 65]
    assert regions.used == 70


@pytest.mark.parametrize(
    "regions, words",
    [
        ((A, replace(OVER, filled="first")), "in use at once"),
        ((replace(A, read="third"), OVER), "in use at once"),
        ((A, OVER, replace(OVER, name="again")), "in use at once"),
        ((A, replace(OVER, count=2)), "not as many places"),
        ((A, replace(OVER, over="c")), "no region c"),
        ((A, OVER, replace(OVER, name="again", over="over")), "no region over with places of its own"),
        ((replace(A, filled="fourth"),), r"no step \['fourth'\]; there are first, second, third"),
        ((replace(A, filled="third"),), "read before it is filled"),
        ((A, replace(B, count=3)), "3 x a, 3 x b takes 39 columns, there are 34"),
        ((A, replace(B, name="a")), "2 regions are called a"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(regions, words):
    with pytest.raises(ValueError, match=words):
        made(*regions)


def test_p_lies_over_the_first_half_of_s():
    pytest.importorskip("cutlass")
    from cute_flash.arch.sm100.tmem import Plan

    plan = Plan(tiles=2, slots=1, tile_n=128, dim_v=128)
    assert [plan.s(tile, 0) for tile in range(2)] == [plan.p(tile, 0) for tile in range(2)] == [0, 128]
    assert [plan.o(tile) for tile in range(2)] == [256, 384]
    assert plan.regions["p"].size * 2 == plan.regions["s"].size


def test_out_may_not_lie_over_q_where_the_next_q_comes_before_it_has_left():
    pytest.importorskip("cutlass")
    from cute_flash.arch.common.memory import regions_of

    operand = SimpleNamespace(bytes=1024, stages=2)
    operands = dict.fromkeys(("q", "k", "v", "out"), operand)
    assert regions_of(operands, apart=False).places() == ["q", "k", "v"]
    apart = regions_of(operands, apart=True)
    assert apart.places() == ["q", "k", "v", "out"]
    wrong = [replace(region, over="q" if region.name == "out" else None) for region in apart.regions]
    with pytest.raises(ValueError, match="in use at once"):
        replace(apart, regions=tuple(wrong))
