"""Masks whose queries see one range of keys each, key by key; and a thread's columns before a key."""

from __future__ import annotations

import pytest

from cute_flash.arch import row_range
from cute_flash.arch.bounds import Shown, Span
from cute_flash.arch.common.columns import Keys
from cute_flash.arch.common.mask import Causal, Document, Mask, PrefixLM, SlidingWindow
from cute_flash.arch.expression import Bound, expression
from cute_flash.arch.row_range import with_row_range
from cute_flash.arch.rule import describe
from cute_flash.rules import MaskFunction
from tests.test_reverse import FUNCTIONS
from tests.test_rules import MASKS, TABLE, text_of

LENGTH = 40
IN_A_RANGE = ("near", "not_far", "same_eight_by_bounds", "clipped", "among_first", "and_true", "all", "none")
NOT_IN_ONE = ("near_or_first", "same_eight", "apart", "others", "odd_keys", "window_or_first")


def ranged(mask: Mask) -> Bound:
    """A mask as forward kernels have it."""
    return with_row_range(expression(text_of(mask))).at(describe(mask)[1], 0, 0, 0, LENGTH)


def check(mask: Mask) -> None:
    """`seen` against `visible`, key by key, for queries before the first key and behind the last one, too."""
    found = ranged(mask)
    for q in range(-30, LENGTH + 30):
        low, high = found.seen(q)
        for k in range(LENGTH):
            visible = bool(found.visible(q, k))
            assert visible == (low <= k < high), f"query {q}, key {k}: {visible}, seen are {low}..{high}"


@pytest.mark.parametrize("mask", [mask for mask in MASKS if ranged(mask).has_range], ids=str)
def test_ranges_are_what_is_visible(mask):
    check(mask)


@pytest.mark.parametrize("name", IN_A_RANGE)
def test_functions_that_show_a_range(name):
    assert ranged(MaskFunction(FUNCTIONS[name])).has_range
    check(MaskFunction(FUNCTIONS[name]))


@pytest.mark.parametrize(
    "mask",
    [*(MaskFunction(FUNCTIONS[name]) for name in NOT_IN_ONE), Document(TABLE)],
    ids=[*NOT_IN_ONE, "document"],
)
def test_what_shows_no_range_is_asked_pair_by_pair(mask):
    found = ranged(mask)
    assert not found.has_range
    assert with_row_range(found.expression) is found.expression


def test_most_masks_that_are_shipped_have_one():
    """All of windows, prefixes and causal masks, and what joins two of these, unless it leaves a gap."""
    assert all(ranged(mask).has_range for mask in (Causal(), PrefixLM(3), SlidingWindow(5, None)))
    assert sum(ranged(mask).has_range for mask in MASKS) > len(MASKS) // 2


def test_a_range_beyond_32_bits_is_none():
    """Bounds are compared in 32 bits."""
    assert not ranged(MaskFunction(lambda q, k: k <= q + (1 << 40))).has_range


def test_a_wrong_range_is_found(monkeypatch):
    wrong = Span(high=9)
    monkeypatch.setattr(row_range, "shown", lambda *asked: Shown(wrong, wrong))
    monkeypatch.setattr("tests.test_row_range.with_row_range", with_row_range.__wrapped__)
    with pytest.raises(AssertionError, match="query -30, key 0"):
        check(Causal())


@pytest.mark.parametrize("in_pairs", [False, True])
def test_columns_before_a_key_are_counted(in_pairs):
    """Of 32 columns whose keys begin with 10; fewer than none and more than all where columns would go on."""
    keys = Keys(10, in_pairs)
    columns = [keys.of(column) for column in range(32)]
    assert columns == sorted(columns) and columns[0] == 10
    for key in range(-40, 300):
        before = keys.before(key)
        assert min(max(before, 0), 32) == sum(column < key for column in columns)
