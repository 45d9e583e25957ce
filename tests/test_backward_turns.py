"""Deterministic gradients: right, of the same bits in any order of events, and without a spilled register."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cute_flash
from cute_flash import executable, launch
from cute_flash.dispatch import EMULATED
from tests import proofs
from tests.cases import CASES, Case
from tests.gradient_cases import steps_of
from tests.harness import Call
from tests.test_resources import EXTREMES, assert_in_registers

# Three key tiles add to a query tile, or three heads to a key tile: two parts have one sum in either order.
# Device, case: Hopper's and Blackwell's own kernels are those of other tests.
KEYS = Case("keys", ((40, 300),), dims=(8, 8), heads=(1, 1), mask="causal", deterministic=True)
RELAYS = {
    "keys": ("sm80", KEYS),
    "heads": ("sm80", replace(KEYS, seqlens=((40, 100),), heads=(3, 1))),
    "sm90_keys": ("sm90", replace(KEYS, dims=(64, 64))),
    "sm90_heads": ("sm90", replace(KEYS, seqlens=((40, 100),), dims=(64, 64), heads=(3, 1), mask="full")),
    "sm100_keys": ("sm100", replace(KEYS, dims=(64, 64))),
    "sm100_heads": ("sm100", replace(KEYS, seqlens=((40, 100),), dims=(64, 64), heads=(3, 1), mask="full")),
}
NAMES = ("varlen_causal", "mask_by_head", "blocks_random_causal", "heads_6_2")
# The rows of the table of tiles that leave fewest registers.
FULLEST = (
    *(("sm80", "light", dims) for dims in ((64, 64), (128, 128), (96, 256))),
    ("sm80", "heavy", (256, 256)),
    ("sm80", "heavy", (96, 256)),
)
SUMS = ("grad_q_sum", "grad_k_sum", "grad_v_sum")


class Relay:
    """A case, causal or not, after its forward pass."""

    def __init__(self, device: str, case: Case):
        self.device, call = device, Call.make(case)
        self.leaves = [x.requires_grad_() for x in call.tensors.values()]
        self.gradients = call.cotangents()
        with cute_flash.emulated(device):
            self.results = cute_flash.flash_attn_func(
                *self.leaves, return_lse=True, deterministic=case.deterministic, **call.arguments
            )

    def sums(self, monkeypatch, **options) -> bytes:
        """What gradients are summed in, before they are rounded. options: the emulator's."""
        found: list[bytes] = []
        run = launch.run

        def noted(bound, values):
            run(bound, values)
            found.extend(values[name].numpy().tobytes() for name in SUMS if name in values)

        with monkeypatch.context() as patch, cute_flash.emulated(self.device, **options):
            patch.setattr(launch, "run", noted)
            torch.autograd.grad(self.results, self.leaves, self.gradients, retain_graph=True)
        assert found
        return b"".join(found)


def ground(device: str, case: Case) -> list[bytes]:
    """All that a case's sums depend on but for the order of events."""
    built = [executable.artifact(*step.compiled, EMULATED[device]).ptx for step in steps_of(case, device)]
    return [*proofs.emulator(), proofs.meaning(Path(__file__)), repr(case).encode(), *built]


@pytest.mark.parametrize("name", NAMES)
def test_right(name):
    Call.make(replace(CASES[name], deterministic=True)).check_gradients("sm80")


@pytest.mark.parametrize("name", RELAYS)
def test_the_same_bits_in_any_order(name, monkeypatch, proven):
    """Twenty random orders of CTAs and warps, the order of the program, and one place for a CTA."""

    def trial() -> str:
        relay = Relay(*RELAYS[name])
        orders = [{"schedule": "random", "seed": seed} for seed in range(20)]
        found = {relay.sums(monkeypatch, **order) for order in ({}, {"ctas_per_wave": 1}, *orders)}
        return f"{len(found)} of {2 + len(orders)}"

    assert proven(trial, ground(*RELAYS[name])) == "1 of 22"


@pytest.mark.parametrize("name", RELAYS)
def test_other_bits_without_turns(name, monkeypatch):
    """In some of a few orders, or they would tell nothing."""
    device, case = RELAYS[name]
    relay = Relay(device, replace(case, deterministic=False))
    assert len({relay.sums(monkeypatch, schedule="random", seed=seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("device, extreme, dims", FULLEST)
def test_no_registers_spill(device, extreme, dims, tmp_path):
    """With the most that a call can ask for."""
    for step in steps_of(replace(EXTREMES[extreme], dims=dims, deterministic=True), device):
        assert_in_registers(step, EMULATED[device], tmp_path / "kernel.cubin")


def test_the_workspace_is_stated():
    """A number for each scratch row; those of keys where heads share them."""
    told = {"device": "sm80", "backward": True, "deterministic": True}
    assert "turns_q int32 (num_heads_q, scratch_rows_q)" in str(cute_flash.supports("float16", 64, **told))
    shared = cute_flash.supports("float16", 64, gqa=True, **told)
    assert "turns_k int32 (num_heads_kv, scratch_rows_k)" in str(shared)
