"""The append kernel: caches after a call are bit for bit the oracle's, and so are rotated queries."""

from __future__ import annotations

import pytest
import torch

from tests.kv_calls import KvCall, KvCase

CAUSAL = {"causal": True}
CASES = (
    KvCase("plain", dims=(64, 32)),
    KvCase("halves", dtype="float16", rotary=(32, False), rows=True, layout="interleaved", arguments=CAUSAL),
    KvCase("neighbours_pages", rotary=(64, True), page=3, packed=True, queries=(2, 0, 9), elsewhere=True),
    KvCase(
        "halves_pages", dims=(72, 128), rotary=(16, False), page=1, new=2, layout="heads_first",
        arguments=CAUSAL,
    ),
    KvCase(
        "neighbours", dims=(256, 8), heads=(1, 1), rotary=(48, True), layout="sliced", new=1,
        arguments=CAUSAL,
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_caches_and_queries(case, machine):
    check(case, machine, races=True)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_warps_in_any_order(case):
    check(case, "sm80", schedule="random", seed=1)


def check(case: KvCase, device: str, **options) -> None:
    """Append, and compare all of the caches' storages and all of q, bit for bit."""
    call = KvCall(case, device)
    seen, after = call.expected()
    found = call.append(**options)
    assert found.seqlens.tolist() == [length + case.new for length in case.lengths]
    call.assert_caches(after)
    if case.rotary:
        assert torch.equal(found.q.cpu().flatten(0, -3), seen.q)
