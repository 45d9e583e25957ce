"""Every case of packed sequences: lengths of zero, used lengths, each feature beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import CASES, RAGGED, Case, singles
from tests.harness import Call
from tests.orders import hold

VARLEN = [case for case in singles() if case.varlen]


@pytest.mark.parametrize("case", VARLEN, ids=str)
def test_varlen(case, machine):
    Call.make(case).check(machine)


@pytest.mark.parametrize("name", ["varlen_causal", "used_qk"])
def test_any_order_of_events(name, arch, proven):
    hold(CASES[name], arch, proven, asynchrony="late", schedule="random", seed=1, races=True)


def test_unused_rows_are_written(machine):
    """Rows of out beyond a used length, but inside their sequence, become 0 and their lse -inf."""
    call = Call.make(replace(CASES["used_q"], seqlens=((140, 33), (64, 64))))
    call.arguments["seqused_q"] = torch.tensor([7, 0], dtype=torch.int32)
    out, lse = call.run(machine)
    unused = torch.ones(204, dtype=torch.bool)
    unused[:7] = False
    assert (out[unused] == 0).all() and lse[:, unused].isneginf().all()
    assert not out[~unused].isnan().any() and lse[:, ~unused].isfinite().all()


def test_packed_equals_one_by_one(machine):
    """Sequences do not see each other: each alone gives the very same numbers."""
    packed = Call.make(Case("", RAGGED, varlen=True, mask="causal"))
    out, lse = packed.run(machine)
    starts = [packed.arguments[f"cu_seqlens_{name}"].tolist() for name in "qk"]
    for i, lengths in enumerate(RAGGED):
        rows, keys = (slice(start[i], start[i + 1]) for start in starts)
        alone = Call.make(Case("", (lengths,), mask="causal"))
        for name, part in (("q", rows), ("k", keys), ("v", keys)):
            alone.tensors[name] = packed.tensors[name][part][None]
        alone_out, alone_lse = alone.run(machine)
        assert torch.equal(alone_out[0], out[rows])
        assert torch.equal(alone_lse[0], lse[:, rows])
