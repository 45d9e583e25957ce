"""Every two features of FP8 together, and of formats whose factors tensor cores apply."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from tests.cases import met_in, pairwise
from tests.harness import call_of
from tests.quantizing import PAIRED, PAIRED_SCALED, PAIRS, SCALED_PAIRS


@pytest.fixture(scope="module")
def device(machine) -> str:
    """Where there is a kernel."""
    if machine == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10, 11) or machine == "sm80":
        pytest.skip("there are kernels for compute capabilities 9.0 to 11.0")
    return machine


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, device):
    call_of(PAIRS[name]).check(device)


@pytest.mark.parametrize("name", SCALED_PAIRS)
def test_pair_of_factors(name, device):
    if device == "sm90" or device == "cuda" and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("there is a kernel for compute capabilities 10.0 to 11.0")
    call_of(SCALED_PAIRS[name]).check(device)


@pytest.mark.parametrize("paired", [PAIRED, PAIRED_SCALED], ids=["FP8", "factors"])
def test_every_pair_is_there(paired):
    met = set().union(*map(met_in, pairwise(paired)))
    for a, b in combinations(paired, 2):
        assert {frozenset(pair) for pair in product(*([(n, x) for x in paired[n]] for n in (a, b)))} <= met
