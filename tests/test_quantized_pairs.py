"""Every two features of FP8 together, and each by itself."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from tests.cases import met_in, pairwise
from tests.harness import call_of
from tests.quantizing import PAIRED, PAIRS


@pytest.fixture(scope="module")
def device(machine) -> str:
    """Where there is a kernel."""
    if machine == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10, 11) or machine == "sm80":
        pytest.skip("there are kernels for compute capabilities 9.0 to 11.0")
    return machine


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, device):
    call_of(PAIRS[name]).check(device)


def test_every_pair_is_there():
    met = set().union(*map(met_in, pairwise(PAIRED)))
    for a, b in combinations(PAIRED, 2):
        assert {frozenset(pair) for pair in product(*([(n, x) for x in PAIRED[n]] for n in (a, b)))} <= met
