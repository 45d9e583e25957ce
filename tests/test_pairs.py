"""Every two features together."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest

from tests.cases import CASES, PAIRED, met_in, pairs, pairwise, row_of, singles
from tests.harness import Call


@pytest.mark.parametrize("case", list(pairs()), ids=str)
def test_pair(case, machine):
    Call.make(case).check(machine)


def test_every_pair_is_there():
    """In a case by itself, or in one of two features and more."""
    met = set().union(*(met_in(row_of(case)) for case in (*singles(), *pairs())))
    for a, b in combinations(PAIRED, 2):
        assert {frozenset(pair) for pair in product(*([(n, x) for x in PAIRED[n]] for n in (a, b)))} <= met


def test_few_rows_cover_them():
    """No fewer rows than the two longest lists of values multiply to, and hardly more; fewer with singles."""
    longest = sorted(len(values) for values in PAIRED.values())[-2:]
    rows = pairwise(PAIRED)
    for a, b in combinations(PAIRED, 2):
        assert {(row[a], row[b]) for row in rows} == set(product(PAIRED[a], PAIRED[b]))
    assert longest[0] * longest[1] <= len(rows) <= 1.2 * longest[0] * longest[1]
    assert len(list(pairs())) <= 0.8 * len(rows)


def test_no_two_cases_are_the_same():
    assert len({replace(case, name="") for case in CASES.values()}) == len(CASES)


def test_a_case_is_the_pairs_that_it_was_made_from():
    known = [row_of(case) for case in singles()]
    assert [row_of(case) for case in pairs()] == pairwise(PAIRED, known)
    assert row_of(CASES["split"]) == row_of(CASES["blocks_causal"]) == row_of(CASES["large_scores"]) == {}
