"""Every case of dense batches: each feature by itself, on the machine at hand, held to the accuracy rule."""

from __future__ import annotations

import pytest
import torch

import cute_flash
from cute_flash import ops
from tests.cases import CASES, Case, singles
from tests.harness import Call, Poisoned, where
from tests.orders import hold

DENSE = [case for case in singles() if not case.varlen]

# One case per way of loading, masking and storing, for the emulator's modes that look for missing waits.
STRICT = ("bfloat16", "dims_128_128", "dims_40_40", "lengths_65_63_causal", "mask_window", "dropout_0.5")
STRICT += ("blocks_random_causal",)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_forward(case, machine):
    Call.make(case).check(machine)


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize(
    "options",
    [
        {"asynchrony": "late", "races": True},
        {"asynchrony": "random", "schedule": "random", "seed": 1, "races": True},
        {"asynchrony": "late", "schedule": "random", "seed": 2},
        {"asynchrony": "random", "schedule": "random", "seed": 3},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_any_order_of_events(name, options, arch, proven):
    """Copies that land as late as waits allow, warps in random order, and no data races."""
    hold(CASES[name], arch, proven, **options)


def test_every_dtype_and_seed(machine):
    for seed in range(3):
        Call.make(CASES["float16"], seed).check(machine)


def test_same_generator_state_same_dropout(machine):
    call = Call.make(CASES["dropout_0.5"])
    torch.manual_seed(7)
    first, _ = call.run(machine)
    second, _ = call.run(machine)
    torch.manual_seed(7)
    third, _ = call.run(machine)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_out_and_lse_are_optional(machine):
    call = Call.make(Case("plain"))
    with where(machine):
        q, k, v = (Poisoned.holding(x, "packed", machine).view for x in call.tensors.values())
        out = cute_flash.flash_attn_func(q, k, v)
        again, lse = cute_flash.flash_attn_func(q, k, v, return_lse=True)
    expected, expected_lse = call.run(machine)
    assert torch.equal(out.cpu(), expected) and torch.equal(again.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)


@pytest.mark.parametrize("name", ["lengths_65_63_causal", "used_qk"])
def test_nothing_is_written_around_lse(name, machine, monkeypatch):
    placed = []

    def new_lse(q, shape):
        placed.append(Poisoned.holding(torch.zeros(shape), "packed", machine))
        return placed[-1].view

    monkeypatch.setattr(ops, "new_lse", new_lse)
    Call.make(CASES[name]).check(machine)
    assert len(placed) == 1
    placed[0].assert_surroundings_untouched()


def test_harness_notices_what_is_written_outside():
    tensor = Poisoned.holding(torch.zeros(3, 2, 8), "sliced", "sm80")
    tensor.assert_surroundings_untouched()
    tensor.storage[0] = 1.0
    with pytest.raises(AssertionError, match="wrote outside"):
        tensor.assert_surroundings_untouched()
