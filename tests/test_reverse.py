"""What backward passes ask of rules, on plain numbers: queries that see keys, and a score's derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cute_flash import rules
from cute_flash.arch.common.blocks import Range, visits_from_keys
from cute_flash.arch.common.mask import Both, Causal, Document, Everything, Mask, PrefixLM, SlidingWindow
from cute_flash.arch.common.score import ALiBi, Chain, Score, Softcap
from cute_flash.arch.derivative import _RULES
from cute_flash.arch.elementwise import absolute, exp, load, log, maximum, minimum, tanh, where
from cute_flash.arch.expression import _OPERATIONS, Bound, Expression, Section, expression
from cute_flash.arch.reverse import EVERYWHERE, NOWHERE, differentiated, seen_from_keys, symbols
from cute_flash.arch.rule import describe, traced
from cute_flash.arch.symbol import text
from cute_flash.dispatch import EMULATED, emulated
from cute_flash.executable import executable
from cute_flash.rules import MaskFunction, ScoreFunction
from tests.cases import SCORES, Sizes, Streaming
from tests.expression_kernel import EXPRESSIONS, ExpressionConfig, ExpressionProblem, Operands
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
ONE_SIDED = ("first_queries", "first_keys")


@pytest.mark.parametrize(
    "mask",
    [*TIGHT, *(MaskFunction(CONDITIONS[name]) for name in ONE_SIDED)],
    ids=[*map(str, TIGHT), *ONE_SIDED],
)
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


@pytest.mark.parametrize(
    "mask", [*MASKS, *map(MaskFunction, FUNCTIONS.values())], ids=[*map(str, MASKS), *map(str, FUNCTIONS)]
)
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


# Scores: functions of s and of two integers, a and b, from tables.
SLOPES: dict[str, Callable] = {
    "itself": lambda s, a, b: s, "nothing": lambda s, a, b: a * 1.5, "negative": lambda s, a, b: -s * a,
    "sum": lambda s, a, b: s * a + s / 4.0, "difference": lambda s, a, b: s * 3 - (b - s) * a,
    "square": lambda s, a, b: s * s, "cube": lambda s, a, b: s**3,
    "product": lambda s, a, b: s * tanh(s) * a, "by_s": lambda s, a, b: a / (s * s + 1.0),
    "quotient": lambda s, a, b: tanh(s) / (s + 9.0), "inverse": lambda s, a, b: (s + 9.0) ** -2,
    "exp": lambda s, a, b: exp(s * 0.3) * s, "cap": lambda s, a, b: a * tanh(s / a),
    "log": lambda s, a, b: log(s * s + 2.0), "root": lambda s, a, b: (s * s + 1.0) ** 0.5,
    "to_the_s": lambda s, a, b: 2.0 ** (s * 0.5), "to_the_b": lambda s, a, b: (s + 9.0) ** (b * 0.5),
    "power_of_power": lambda s, a, b: (s * s + 1.0) ** (s * 0.25),
    "0_to_the_0": lambda s, a, b: (s - s) ** (b * 0.0) + s,
    "0_to_the_s": lambda s, a, b: (a * 0.0) ** (s + 9.0) + s,
    "absolute": lambda s, a, b: absolute(s) * a, "minimum": lambda s, a, b: minimum(s, a * 0.3),
    "maximum": lambda s, a, b: maximum(s * s, maximum(2.0, s)),
    "where": lambda s, a, b: where(a < b, s * 0.5, s), "hidden": lambda s, a, b: where(a < b, -math.inf, s),
    "where_of_s": lambda s, a, b: where(s > 0.1, s * s, where(s < -1, s * a, 7.0)),
    "steps": lambda s, a, b: where(s > 0, 1, 0) * 3, "counted": lambda s, a, b: s * where(s > 0, 2, a),
    "remainder": lambda s, a, b: s % 0.75 * a, "of_integers": lambda s, a, b: (a - b) % 3 * s,
    "shared": lambda s, a, b: exp(tanh(s)) + tanh(s) * exp(tanh(s)),
}
# Those that torch has no derivative for.
STEPS: dict[str, Callable] = {
    "floor": lambda s, a, b: s // 0.75 + s * 2,
    "remainder_by_s": lambda s, a, b: 70.0 % (s * s + 1.0),
}


@dataclass(frozen=True)
class Sloped(Score):
    """A function of a score and of two numbers, each a field or from a table."""

    a: Any
    b: Any
    function: Callable

    def score(self, s, batch, head, q, k):
        return self.function(s, *(load(x, k) if hasattr(x, "shape") else x for x in (self.a, self.b)))


def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, float64 but exact in float32, and two integers: all signs meet, and no two are equal."""
    generator = torch.Generator().manual_seed(11)
    s = (torch.randn(96, generator=generator) * 3).double()
    a = torch.tensor([-5, -2, 1, 3, 7, 4]).repeat(16).to(torch.int8)
    return s, a, torch.tensor([2, 6, -3]).repeat(32).to(torch.int8)


def slope_of(rule: Score) -> Bound:
    kind, values = describe(rule)
    return differentiated(expression(traced(kind))).at(values, 0, 0, 0, 0)


def by_autograd(rule: Score, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple:
    """(score, its derivative) of a rule's Python on tensors."""
    s = s.clone().requires_grad_()
    score = rule.score(s, 0, 0, q, k)
    if not score.requires_grad:
        return score.double(), torch.zeros_like(s)
    return score.detach(), torch.autograd.grad(score.sum(), s)[0]


def by_differences(rule: Score, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple:
    """The same, for rules that are smooth but for steps."""
    low, score, high = (rule.score(s + step, 0, 0, q, k) for step in (-1e-5, 0.0, 1e-5))
    return score, (high - low) / 2e-5


@pytest.mark.parametrize("name", [*SLOPES, *STEPS])
def test_derivatives_are_those_of_the_rules_python(name):
    """On tensors, and on plain numbers one by one."""
    s, a, b = numbers()
    function, k = {**SLOPES, **STEPS}[name], torch.arange(len(s))
    rule = Sloped(a, b, function)
    wanted = (by_autograd if name in SLOPES else by_differences)(rule, s, k, k)
    at_once = slope_of(rule).derivative(s, 0, 0, k, k)
    one_by_one = [
        slope_of(Sloped(i, j, function)).derivative(x, 0, 0, 0, 0)
        for x, i, j in zip(s.tolist(), a.tolist(), b.tolist(), strict=True)
    ]
    for want, found, each in zip(wanted, at_once, zip(*one_by_one, strict=True), strict=True):
        assert want.isfinite().all() or name == "hidden"
        torch.testing.assert_close(torch.as_tensor(found).double().broadcast_to(s.shape), want)
        torch.testing.assert_close(torch.tensor(each).double(), want)


def test_every_operation_has_a_derivative():
    """All are tried that may give a float which depends on s."""
    without = {"&", "|", "^", "~", "<<", ">>", "divide_unsigned", "remainder_unsigned", "load"}
    without |= {"<", "<=", ">", ">=", "==", "!=", "as_int32", "as_int64", "to_float"}
    assert set(_OPERATIONS) - without == set(_RULES)
    functions = *SLOPES.values(), *STEPS.values()
    texts = [traced(describe(Sloped(*numbers()[1:], function))[0]) for function in functions]
    nodes = [node for text in texts for node in expression(text).sections["score"].nodes]
    assert {node.op for node in nodes if node.kind == "float" and "s" in node.needs} >= set(_RULES)


@pytest.mark.parametrize("name", [*SCORES, "large_cap"])
def test_derivatives_of_rules(name):
    """Small and large arguments, of the rules that calls are tested with."""
    told = SCORES.get(name, lambda _: {"softcap": 1e4})(Sizes(1, 2, 40, 40, torch.Generator().manual_seed(0)))
    given = rules.score_of(told.get("softcap", 0.0), told.get("alibi_slopes"), told.get("score"))
    rule, generator = Chain(tuple(part.form() for part in given)), torch.Generator().manual_seed(1)
    s = torch.cat([torch.randn(40, generator=generator) * 10.0**e for e in (-6, -2, 0, 1, 3)]).double()
    q, k = torch.randint(0, 40, (2, len(s)), generator=generator)
    wanted = by_autograd(rule, s, q, k)
    for found, want in zip(slope_of(rule).derivative(s, 0, 0, q, k), wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(found).double().broadcast_to(s.shape), want.double())


def test_derivatives_cost_little():
    """What cancels is not computed, what both need is computed once, and 1 and 0 are plain numbers."""
    cap = slope_of(Softcap(30.0))
    work = [node.op for node in cap.expression.sections["derivative"].per_pair]
    assert work == ["/", "tanh", "*", "*", "-"]
    tables = torch.zeros(4)
    for rule, expected in ((ALiBi(tables), 1.0), (ScoreFunction(lambda s, batch, head, q, k: q * 0.5), 0.0)):
        _, slope = slope_of(rule).derivative(0.3, 0, 0, 5, 2)
        assert type(slope) is float and slope == expected


def test_a_slope_is_of_the_side_that_is_taken():
    """The other one may be infinite or NaN; at a corner it is the side that the value is of."""
    def roots(s, batch, head, q, k):
        return where(s > 0, s**0.5, s * 3)

    assert slope_of(ScoreFunction(roots)).derivative(-2.0, 0, 0, 0, 0) == (-6.0, 3.0)
    corner = slope_of(ScoreFunction(lambda s, batch, head, q, k: maximum(absolute(s), s * 2)))
    assert corner.derivative(0.0, 0, 0, 0, 0) == (0.0, 2.0)


def test_derivatives_on_the_device():
    """As on plain numbers, to the rounding of float32 and of its exponentials."""
    s, a, b = numbers()
    left_out = ("0_to_the_0", "0_to_the_s")  # powers there are exponentials of a logarithm
    told = {name: Sloped(a, b, function) for name, function in SLOPES.items() if name not in left_out}
    texts = []
    for rule in told.values():
        found = slope_of(rule).expression
        values = symbols(found.sections["derivative"])
        texts += [f"{found.text.partition(chr(10))[0]}\nscore = {text((value,))}" for value in values]
    problem = ExpressionProblem(tuple(texts), ("int8", "int8"))
    run = executable(EXPRESSIONS, problem, ExpressionConfig(), EMULATED["sm80"], "emulator")
    k, floats = torch.arange(len(s), dtype=torch.int32), torch.full((len(texts), len(s)), math.nan)
    with emulated("sm80"):
        run(*Operands(k, k, s.float(), torch.zeros(len(texts), len(s), dtype=torch.int64), floats, (a, b)))
    for n, (name, rule) in enumerate(told.items()):
        for got, want in zip(floats[2 * n : 2 * n + 2], by_autograd(rule, s, k, k), strict=True):
            near = torch.isclose(got.double(), want.double(), rtol=2e-5, atol=1e-5)
            assert near.all(), f"{name}: {got[~near][:3]} where {want[~near][:3]} is right"
