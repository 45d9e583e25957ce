"""Every two features together."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.cases import PAIRED, pairs, pairwise
from tests.harness import Call


@pytest.mark.parametrize("case", list(pairs()), ids=str)
def test_pair(case, machine):
    Call.make(case).check(machine)


def test_every_pair_is_there():
    rows = pairwise(PAIRED)
    for a, b in combinations(PAIRED, 2):
        assert {(row[a], row[b]) for row in rows} == set(product(PAIRED[a], PAIRED[b]))


def test_few_rows_cover_them():
    """No fewer rows than the two longest lists of values multiply to, and hardly more."""
    longest = sorted(len(values) for values in PAIRED.values())[-2:]
    assert longest[0] * longest[1] <= len(pairwise(PAIRED)) <= 1.2 * longest[0] * longest[1]
