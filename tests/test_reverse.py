"""What backward passes ask of rules, on plain numbers: queries that see keys, and a score's derivative."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cute_flash.arch.common.blocks import Range, visits_from_keys
from cute_flash.arch.common.mask import Both, Causal, Document, Everything, Mask, PrefixLM, SlidingWindow
from cute_flash.arch.expression import Bound, Expression, Section, expression
from cute_flash.arch.reverse import EVERYWHERE, NOWHERE, seen_from_keys, symbols
from cute_flash.arch.rule import describe
from cute_flash.arch.symbol import text
from cute_flash.rules import MaskFunction
from tests.cases import Streaming
from tests.test_block_mask import walked, with_phases
from tests.test_rules import MASKS, ODD, TABLE, check_ranges, known, places, text_of, windows

CONDITIONS = {
    "first_queries": lambda q, k: q < 9,
    "first_keys": lambda q, k: k < 9,
    "global": lambda q, k: (k < 3) | (q < 3) | (q - k <= 4) & (k - q <= 4),
    "global_queries_first": lambda q, k: (q < 3) | (q - k <= 4) & (k - q <= 4) & (k >= 1),
    "neither": lambda q, k: ~((q < 9) | (k == 20)),
    "window_or_first": lambda q, k: (q - k <= 6) & (k <= q) | (k < 5),
    "odd_keys": lambda q, k: (k <= q) & (k % 2 == 1),
}
FUNCTIONS = {**ODD, **CONDITIONS}


def from_keys(mask: Mask, seqlen_q: int = 0, seqlen_k: int = 0) -> Bound:
    """A mask as backward kernels have it."""
    return seen_from_keys(expression(text_of(mask))).at(describe(mask)[1], 0, 0, seqlen_q, seqlen_k)


def check_queries(mask: Mask, k_first: int, k_last: int) -> None:
    """`queries` and `full_queries` against `visible`, query by query, those before the first key too."""
    found = from_keys(mask)
    low, high = found.queries(k_first, k_last)
    full_low, full_high = found.full_queries(k_first, k_last)
    for q in range(-20, 55):
        seen = [found.visible(q, k) for k in range(k_first, k_last + 1)]
        assert low <= q < high or not any(seen), f"query {q} sees keys and is outside {low}..{high}"
        assert not full_low <= q < full_high or all(seen), f"query {q} is inside {full_low}..{full_high}"


KEYS = [(0, 0), (0, 7), (3, 10), (30, 45)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_queries_hold_for_every_pair(mask):
    for keys in KEYS:
        check_queries(mask, *keys)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_queries_of_a_function_hold_for_every_pair(name):
    for keys in KEYS:
        check_queries(MaskFunction(FUNCTIONS[name]), *keys)


@pytest.mark.parametrize("name", CONDITIONS)
def test_keys_of_a_condition_on_queries_hold_for_every_pair(name):
    found = known(MaskFunction(CONDITIONS[name]))
    for place in places(seed=6, count=40):
        check_ranges(found, *place)


def test_wrong_queries_are_found(monkeypatch):
    """A mask that sees one key more than its text says."""
    monkeypatch.setattr(Bound, "visible", lambda self, q, k: k <= q + 1)
    with pytest.raises(AssertionError, match="sees keys and is outside"):
        check_queries(Causal(), 3, 18)
    monkeypatch.setattr(Bound, "visible", lambda self, q, k: k <= q - 1)
    with pytest.raises(AssertionError, match="is inside"):
        check_queries(Causal(), 3, 18)


TIGHT = [Everything(), Causal(), PrefixLM(5), PrefixLM(40), Both(Causal(), SlidingWindow(9, None))]
TIGHT += [mask for mask in windows() if None in (mask.left, mask.right) or mask.left + mask.right >= 0]
TIGHT += [MaskFunction(CONDITIONS[name]) for name in ("first_queries", "first_keys")]


@pytest.mark.parametrize("mask", TIGHT, ids=str)
def test_queries_are_worth_having(mask):
    """The least range that holds all queries that see a key, and all queries that see every one."""
    tried = range(-60, 70)
    for k_first, k_last in KEYS:
        found = from_keys(mask)
        keys = range(k_first, k_last + 1)
        some = [q for q in tried if any(found.visible(q, k) for k in keys)]
        every = [q for q in tried if all(found.visible(q, k) for k in keys)]
        bounds = found.queries(k_first, k_last), found.full_queries(k_first, k_last)
        for expected, (low, high) in zip((some, every), bounds, strict=True):
            assert [q for q in tried if low <= q < high] == expected


def test_open_ends_are_plain_numbers():
    """So that a loop's phase that is never entered costs no code."""
    assert from_keys(Causal()).queries(3, 4)[1] == EVERYWHERE[1]
    assert from_keys(SlidingWindow(3, None)).full_queries(3, 4)[0] == EVERYWHERE[0]
    assert from_keys(Document(TABLE)).full_queries(3, 4) == NOWHERE


@pytest.mark.parametrize("mask", [*MASKS, *map(MaskFunction, FUNCTIONS.values())], ids=str)
def test_symbols_are_the_inverse_of_reading(mask):
    rule = expression(text_of(mask))
    for name, section in rule.sections.items():
        leaves = " ".join(["leaves", *rule.leaves()])
        again = Expression(f"{leaves}\n{name} = {text(symbols(section))}").sections[name]
        assert [tree(again, n) for n in again.results] == [tree(section, n) for n in section.results]


def tree(section: Section, n: int) -> tuple:
    """A node with all that it is made of."""
    op, args, *rest = section.nodes[n]
    made_of = args if op in ("leaf", "constant", "size") else tuple(tree(section, arg) for arg in args)
    return op, made_of, *rest


SHAPES = [(50, 70), (70, 50), (64, 64), (1, 40), (40, 1), (5, 0), (0, 5), (33, 48)]


VISITED = [None, Everything(), Causal(), SlidingWindow(9, 3), PrefixLM(20), Streaming(4, 9)]


@pytest.mark.parametrize("mask", VISITED, ids=str)
@pytest.mark.parametrize("tile", [(16, 16), (8, 24)], ids=str)
def test_blocks_that_keys_are_seen_by(mask, tile):
    """Every one, from the last to the first; masked where any of its rows does not see every key."""
    tile_m, keys = tile
    for shape in SHAPES:
        for first_key in range(0, 96, keys):
            found = visits(mask, shape, tile, first_key)
            seen = [[sees(mask, shape, row, first_key + i) for i in range(keys)] for row in range(shape[0])]
            blocks = walked(found)
            assert blocks == sorted(set(blocks), reverse=True)
            assert {row // tile_m for row in range(shape[0]) if any(seen[row])} <= set(blocks)
            for block, masked in with_phases(found):
                assert masked or all(map(all, seen[block * tile_m : (block + 1) * tile_m]))
                assert block * tile_m < shape[0]


def test_few_blocks_are_masked():
    """And none for the sake of rows that do not exist."""
    for mask, shape, first_key, expected in (
        (None, (50, 64), 16, [(3, False), (2, False), (1, False), (0, False)]),
        (None, (20, 63), 48, [(1, True), (0, True)]),
        (None, (50, 64), 64, []),
        (Causal(), (64, 64), 32, [(3, False), (2, True)]),
        (Causal(), (50, 66), 32, [(3, False), (2, False), (1, True)]),
        (Causal(), (64, 32), 16, [(3, True)]),
        (SlidingWindow(33, 0), (160, 160), 48, [(6, True), (5, True), (4, False), (3, True)]),
    ):
        assert with_phases(visits(mask, shape, (16, 16), first_key)) == expected


def visits(mask: Mask | None, shape: tuple[int, int], tile: tuple[int, int], first_key: int) -> Range:
    """What a backward kernel visits. shape: (seqlen_q, seqlen_k)."""
    rule = mask and from_keys(mask, *shape)
    rules = SimpleNamespace(mask=rule, seqlen_k=shape[1])
    sequence = SimpleNamespace(seqlen_q=shape[0], seqlen_k=shape[1], offset=shape[1] - shape[0])
    return visits_from_keys(SimpleNamespace(block_size=None), tile, None, rules, sequence, first_key)


def sees(mask: Mask | None, shape: tuple[int, int], row: int, key: int) -> bool:
    return key < shape[1] and (mask is None or mask.visible(row + shape[1] - shape[0], key))
