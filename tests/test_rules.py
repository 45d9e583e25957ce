"""Rules on plain integers: block ranges against `visible`, and the way from object to type and back."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from typing import Any

import pytest
import torch

from cute_flash.arch.common.blocks import Phase, phases
from cute_flash.arch.common.mask import (
    Both,
    Causal,
    Document,
    Either,
    Everything,
    Mask,
    PrefixLM,
    SlidingWindow,
)
from cute_flash.arch.common.score import ALiBi, Chain, Score, Softcap
from cute_flash.arch.elementwise import maximum, minimum
from cute_flash.arch.expression import LARGEST_POSITION, expression
from cute_flash.arch.rule import describe, traced
from cute_flash.arch.symbol import TableSymbol
from cute_flash.rules import MaskFunction


@dataclasses.dataclass(frozen=True)
class EveryThird(Mask):
    """A user's rule without block ranges."""

    offset: int

    def visible(self, q, k):
        return (k + self.offset) % 3 == 0


@dataclasses.dataclass(frozen=True)
class TooWide(Mask):
    """Claims more fully visible keys than there are: what the brute force must catch."""

    def visible(self, q, k):
        return k <= q

    def full(self, q_first, q_last, seqlen_k):
        return 0, q_last + 1


@dataclasses.dataclass(frozen=True)
class TooNarrow(Mask):
    """Hides a visible key from the block range."""

    def visible(self, q, k):
        return k <= q

    def keys(self, q_first, q_last, seqlen_k):
        return 0, q_last


def windows() -> list[Mask]:
    sides = (None, -3, -1, 0, 1, 4, 17)
    return [SlidingWindow(left, right) for left in sides for right in sides]


SIMPLE = [Everything(), Causal(), PrefixLM(0), PrefixLM(5), PrefixLM(40), EveryThird(1), *windows()]
WINDOWS = [SlidingWindow(4, 2), SlidingWindow(None, 1), SlidingWindow(2, None)]
PAIRED = [Causal(), *WINDOWS, PrefixLM(7), EveryThird(0)]
NESTED = [
    Both(Either(Causal(), SlidingWindow(9, 9)), SlidingWindow(5, None)),
    Either(Both(Causal(), SlidingWindow(4, 2)), PrefixLM(3)),
]
MASKS = SIMPLE + [kind(a, b) for kind in (Both, Either) for a in PAIRED for b in PAIRED] + NESTED


def check_ranges(mask: Mask, q_first: int, q_last: int, seqlen_k: int) -> None:
    """`keys` and `full` against `visible`, key by key."""
    low, high = mask.keys(q_first, q_last, seqlen_k)
    full_low, full_high = mask.full(q_first, q_last, seqlen_k)
    for k in range(seqlen_k):
        seen = [bool(mask.visible(q, k)) for q in range(q_first, q_last + 1)]
        assert low <= k < high or not any(seen), f"{mask}: key {k} is seen outside {low}..{high}"
        if full_low <= k < full_high:
            assert all(seen), f"{mask}: key {k} is hidden inside {full_low}..{full_high}"


def places(seed: int, count: int) -> list[tuple[int, int, int]]:
    """(first query, last query, seqlen_k), positions before the first key included."""
    rng = random.Random(seed)
    firsts = [(rng.randint(-30, 60), rng.choice((0, 1, 15, 31))) for _ in range(count)]
    return [(first, first + more, rng.choice((0, 1, 16, 33, 50))) for first, more in firsts]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_ranges_hold_for_every_pair(mask):
    for q_first, q_last, seqlen_k in places(seed=1, count=40):
        check_ranges(mask, q_first, q_last, seqlen_k)


@pytest.mark.parametrize("mask", [TooWide(), TooNarrow()], ids=str)
def test_wrong_ranges_are_found(mask):
    with pytest.raises(AssertionError, match="key"):
        for place in places(seed=1, count=40):
            check_ranges(mask, *place)


def phases_of(mask: Mask, q_first: int, q_last: int, seqlen_k: int, tile_n: int) -> list[Phase]:
    about = q_first, q_last, seqlen_k
    return phases(mask.keys(*about), mask.full(*about), seqlen_k, tile_n)


@pytest.mark.parametrize("tile_n", [1, 8, 16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_phases_visit_what_is_visible_and_mask_what_is_not(mask, tile_n):
    for q_first, q_last, seqlen_k in places(seed=2, count=20):
        visited = []
        for first, last, masked in phases_of(mask, q_first, q_last, seqlen_k, tile_n):
            blocks = list(range(first, last))
            visited += reversed(blocks)
            for k in (k for n in blocks for k in range(n * tile_n, (n + 1) * tile_n) if not masked):
                assert k < seqlen_k
                assert all(mask.visible(q, k) for q in range(q_first, q_last + 1))
        assert visited == sorted(set(visited), reverse=True), "latest first, none twice"
        covered = {k for n in visited for k in range(n * tile_n, (n + 1) * tile_n)}
        for k in set(range(seqlen_k)) - covered:
            assert not any(mask.visible(q, k) for q in range(q_first, q_last + 1))


def test_phases_skip_work():
    """Not only right but worth having: a narrow window visits few blocks, a causal row block masks few."""
    window = phases_of(SlidingWindow(16, 0), 512, 527, 1024, 16)
    assert sum(max(0, p.last - p.first) for p in window) <= 3
    causal = phases_of(Causal(), 512, 527, 1024, 16)
    assert sum(p.last - p.first for p in causal) == 33
    assert sum(p.last - p.first for p in causal if p.masked) == 1
    assert [p.masked for p in phases_of(EveryThird(0), 0, 15, 64, 16)] == [True]


class Table:
    """Stands for a tensor: what `describe` looks at."""

    def __init__(self, dtype: str, ndim: int):
        self.dtype, self.ndim = f"torch.{dtype}", ndim

    def data_ptr(self):
        raise AssertionError("describe must not touch data")


TABLE = Table("float32", 2)
ROUND_TRIPS = [
    (Causal(), ()),
    (SlidingWindow(3, None), ("int",)),
    (SlidingWindow(None, 4), ("int",)),
    (PrefixLM(5) & SlidingWindow(1, 2), ("int", "int", "int")),
    (EveryThird(2**40), ("int64",)),
    (Document(Table("int32", 2)), ("tensor:int32:2",)),
    (Chain((Softcap(30.0), ALiBi(TABLE))), ("float", "tensor:float32:2")),
    (Chain(()), ()),
]


@pytest.mark.parametrize("rule,leaves", ROUND_TRIPS, ids=lambda v: str(v)[:40])
def test_describe_and_build_are_inverse(rule, leaves):
    kind, values = describe(rule)
    assert kind.leaves() == leaves
    assert len(values) == len(leaves)
    assert kind.build(values) == rule
    assert describe(kind.build(values)) == (kind, values)


def test_values_do_not_enter_the_type_but_absence_does():
    assert describe(SlidingWindow(3, 4))[0] == describe(SlidingWindow(5, 6))[0]
    assert describe(SlidingWindow(3, None))[0] != describe(SlidingWindow(3, 4))[0]
    assert describe(Causal() & PrefixLM(1))[0] != describe(PrefixLM(1) & Causal())[0]
    assert len({describe(SlidingWindow(i, None))[0] for i in range(9)}) == 1


def test_build_takes_exactly_its_values():
    kind, values = describe(SlidingWindow(3, 4))
    with pytest.raises(ValueError, match="takes 2 values, got 3"):
        kind.build((*values, 1))


@pytest.mark.parametrize("value", [True, "3", [1], object()])
def test_describe_names_class_and_field(value):
    with pytest.raises(TypeError, match=r"SlidingWindow\.left is"):
        describe(SlidingWindow(value, None))


def test_softcap_and_alibi_on_host_numbers():
    assert Softcap(2.0).score(1e9, 0, 0, 0, 0) == pytest.approx(2.0)
    assert Softcap(2.0).score(1e-3, 0, 0, 0, 0) == pytest.approx(1e-3, rel=1e-6)
    with pytest.raises(NotImplementedError, match="defines no score"):
        Score().score(0.0, 0, 0, 0, 0)


def test_bounds_beyond_every_position_count_as_none():
    unbounded = 2**31 - 1
    for rule in (SlidingWindow(None, unbounded), SlidingWindow(2**40, None), PrefixLM(unbounded)):
        kind, values = describe(rule)
        assert kind.leaves() == ("int",) and values == (LARGEST_POSITION,)
    assert describe(SlidingWindow(-(2**40), 3))[1] == (-LARGEST_POSITION, 3)
    with pytest.raises(ValueError, match=r"EveryThird\.offset is 1\d+; allowed: integers of 64 bits"):
        describe(EveryThird(10**19))


def text_of(mask: Mask) -> str:
    return traced(describe(mask)[0])


class Outside:
    """What a rule may look at besides its fields."""

    width = step = 1


@dataclasses.dataclass(frozen=True)
class Reaching(Mask):
    """Looks at attributes of classes, its own and another one, by a property and a static method."""

    reach = 1

    @property
    def width(self):
        return Outside.width

    @staticmethod
    def step():
        return Outside.step

    def visible(self, q, k):
        return (k > q - self.width) & (k % self.step() != self.reach)


def test_whatever_a_rule_looks_at_is_in_its_text(monkeypatch):
    seen = {text_of(Reaching())}
    for owner, name in ((Outside, "width"), (Outside, "step"), (Reaching, "reach")):
        monkeypatch.setattr(owner, name, 5)
        seen.add(text_of(Reaching()))
    assert len(seen) == 4


def test_a_text_holds_what_is_computed_and_no_names():
    @dataclasses.dataclass(frozen=True)
    class Another(Mask):
        shift: int

        def visible(self, query, key):
            return (key + self.shift) % 3 == 0

    assert text_of(Another(4)) == text_of(EveryThird(7))
    visible = "visible = (((k + int0) % 3) == 0)"
    assert text_of(EveryThird(7)) == f"leaves int\n{visible}\nkeys = 0, seqlen_k\nfull = 0, 0"


def test_tables_are_read_by_load_or_by_index():
    @dataclasses.dataclass(frozen=True)
    class Reads(Mask):
        table: Any

        def visible(self, q, k):
            return self.table[k, -1] == self.table[q, 0]

    rows = torch.tensor([[1, 2], [2, 3], [3, 1]], dtype=torch.int32)
    found = known(Reads(rows))
    for q, k in itertools.product(range(-3, 3), range(3)):
        assert found.visible(q, k) == (rows[k, -1] == rows[q, 0]).item()
    for index, message in (((0,), "2 dimensions is read with 1 indices"), ((0.5, 0), "which is no integer")):
        with pytest.raises(TypeError, match=message):
            TableSymbol("table0", "int", 2).load(index)


def test_what_is_used_twice_is_written_once():
    @dataclasses.dataclass(frozen=True)
    class Long(Mask):
        def visible(self, q, k):
            x = q - k
            for _ in range(60):
                x = x * x % 7
            return x == 0

    assert len(text_of(Long())) < 3000


WRONG = {
    "and": (lambda q, k: k <= q and k > q - 5, "write & for and"),
    "or": (lambda q, k: k <= q or k < 3, r"\| for or"),
    "not": (lambda q, k: not k <= q, "~ for not"),
    "if": (lambda q, k: k <= q if q > 3 else k < 3, r"where\(condition, a, b\) for if"),
    "chain": (lambda q, k: 0 < k < q, r"\(a < b\) & \(b < c\) for a < b < c"),
    "min": (lambda q, k: k < min(q, 5), "minimum and maximum for min and max"),
    "int": (lambda q, k: int(k / 2) < q, r"not int\(\)"),
    "float": (lambda q, k: float(k) < q, "to_float"),
    "list": (lambda q, k: [1, 2, 3][k] < q, "index of a list"),
    "number": (lambda q, k: q - k, "returns .*which is a number; allowed: a comparison"),
    "text": (lambda q, k: k < "q", "'q' .str. meets a value of a rule"),
    "and_of_floats": (lambda q, k: q * 0.5 & k, "& is of integers and truth values"),
    "shift": (lambda q, k: q << -1 > k, "a shift is by 0 or more"),
    "power": (lambda q, k: q**k > 3, "integers are raised to constant powers only"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_traced_says_what_to_write(name):
    function, message = WRONG[name]
    with pytest.raises(TypeError, match=f"<lambda> cannot be compiled: .*{message}"):
        text_of(MaskFunction(function))


@dataclasses.dataclass(frozen=True)
class Without(Mask):
    """A mask without bounds of its own."""

    mask: Mask

    def visible(self, q, k):
        return self.mask.visible(q, k)


def known(mask: Mask):
    """A mask's expression with its values: what kernels evaluate."""
    kind, values = describe(mask)
    return expression(traced(kind)).at(values, 0, 0, 0, 0)


ODD = {
    "near": lambda q, k: q - k < 5,
    "near_or_first": lambda q, k: (q - k >= 0) & (q - k <= 9) | (k < 4),
    "not_far": lambda q, k: ~((k > q) | (k < q - 7)),
    "not_both": lambda q, k: ~((k > q) & (k > 3)),
    "same_eight": lambda q, k: k // 8 == q // 8,
    "same_eight_by_bounds": lambda q, k: (k >= q // 8 * 8) & (k < q // 8 * 8 + 8),
    "apart": lambda q, k: (k < 5) ^ (q > 3),
    "negated": lambda q, k: (-k > -q) & (2 * k > q),
    "itself": lambda q, k: k == q,
    "others": lambda q, k: k != q,
    "clipped": lambda q, k: (k <= maximum(q, 7)) & (minimum(q, 20) - 3 < k),
    "among_first": lambda q, k: (q < 9) & (k < 9),
    "and_true": lambda q, k: (k <= q) & True,
    "all": lambda q, k: True,
    "none": lambda q, k: False,
}


@pytest.mark.parametrize("mask", [Without(mask) for mask in MASKS], ids=str)
def test_bounds_that_are_read_off_hold_for_every_pair(mask):
    found = known(mask)
    for q_first, q_last, seqlen_k in places(seed=4, count=40):
        check_ranges(found, q_first, q_last, seqlen_k)


@pytest.mark.parametrize("name", ODD)
def test_bounds_of_a_function_hold_for_every_pair(name):
    found = known(MaskFunction(ODD[name]))
    for q_first, q_last, seqlen_k in places(seed=4, count=40):
        check_ranges(found, q_first, q_last, seqlen_k)


def test_bounds_that_are_read_off_are_worth_having():
    """They are those that masks give which ship."""
    for mask in (Causal(), *WINDOWS, Both(Causal(), SlidingWindow(9, None))):
        for method in ("keys", "full"):
            given, read = (getattr(known(m), method) for m in (mask, Without(mask)))
            for place in places(seed=5, count=20):
                (low, high), (low_read, high_read) = given(*place), read(*place)
                assert max(low, 0) == max(low_read, 0) and min(high, place[2]) == min(high_read, place[2])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_an_expression_answers_like_its_rule(mask):
    found = known(mask)
    for q_first, q_last, seqlen_k in places(seed=3, count=10):
        check_ranges(found, q_first, q_last, seqlen_k)
        for k in range(seqlen_k):
            assert found.visible(q_last, k) == mask.visible(q_last, k)


def test_what_kernels_ask_of_an_expression():
    light = [mask for mask in MASKS if expression(text_of(mask)).is_light()]
    assert all(isinstance(mask, (Everything, Causal, SlidingWindow, Both)) for mask in light)
    assert {Causal(), *windows()} <= set(light)
    for mask in (SlidingWindow(4, 2), Both(Causal(), SlidingWindow(2, None)), *NESTED[:1]):
        assert expression(text_of(mask)).sees_few()
    for mask in (Causal(), PrefixLM(5), EveryThird(1), SlidingWindow(None, 4)):
        assert not expression(text_of(mask)).sees_few()
    assert expression(text_of(Document(TABLE))).ignores_head()


def test_a_large_cap_is_exact_for_small_scores():
    for cap in (1e5, 1e30):
        found = known(Softcap(cap))
        assert found.score(7.3, 0, 0, 0, 0) == pytest.approx(7.3, rel=1e-8)
        assert found.score(cap * 10, 0, 0, 0, 0) == pytest.approx(cap)


@dataclasses.dataclass(frozen=True)
class Far(Mask):
    """A user's mask whose ranges are read off what it shows."""

    far: int

    def visible(self, q, k):
        return q - k <= self.far * STRETCHED


@dataclasses.dataclass(frozen=True)
class FarInRange(Far):
    """The same with a range of its own."""

    def keys(self, q_first, q_last, seqlen_k):
        return q_first - self.far * STRETCHED, seqlen_k


STRETCHED = 1


def test_what_is_implied_is_remembered_by_what_implies_it(monkeypatch):
    """Of many kinds the same text as found anew, in any order; a few are kept."""
    monkeypatch.setattr("cute_flash.arch.rule.MOST_KNOWN", 3)
    known: dict[tuple[str, ...], list[str]] = {}
    everything = [Far(3), Far(2**40), FarInRange(3), Causal() & Far(3), Far(3) | Far(4), Softcap(2.0)]
    for stretched in (1, 2, 3, 1, 2):
        monkeypatch.setattr(sys.modules[__name__], "STRETCHED", stretched)
        for rule in everything:
            kind, _ = describe(rule)
            assert traced(kind, known) == traced(kind)
            assert 0 < len(known) <= 3
    assert "keys" not in "".join(traced(describe(Softcap(2.0))[0]))
