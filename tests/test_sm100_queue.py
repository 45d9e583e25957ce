"""Blackwell's CTAs that take the tiles of others that have not begun (`clusterlaunchcontrol`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash import repeat
from cute_flash.arch.sm100 import tuning
from tests.cases import CASES, Case
from tests.harness import Call, answer_for
from tests.orders import hold

ALONE = replace(CASES["varlen_causal"], dims=(64, 64))
PAIR = Case("pair", ((512, 300),) * 3, heads=(1, 1), dims=(128, 128))
HALF_DIMS = Case("half", ((300, 140),) * 2, heads=(4, 2), dims=(64, 64), mask="causal")
# Two CTAs are resident: all other tiles must be asked for.
RESIDENT = {"ctas_per_wave": 2}
ORDERS = (
    {"asynchrony": "eager"},
    {"asynchrony": "late", "races": True},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, "races": seed < 1} for seed in range(3)),
)


@pytest.fixture
def queues_only(monkeypatch):
    """Every config asks for tiles."""

    def scheduled(config, problem, device):
        return replace(config, dynamic=True, softmax_registers=184, other_registers=64)

    monkeypatch.setattr(tuning.FORWARD, "scheduled", scheduled)
    repeat.forget()
    yield
    repeat.forget()


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("case", [ALONE, PAIR, HALF_DIMS], ids=str)
def test_any_order_of_events(case, options, queues_only, proven):
    assert answer_for(case, "sm100").config.dynamic
    hold(case, "sm100", proven, **RESIDENT, **options)


FEATURES = ("used_qk", "mask_window", "sink_without_keys", "split_causal", "dropout_0.5")


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, queues_only):
    Call.make(CASES[name]).check("sm100", **RESIDENT)


def test_ctas_take_what_has_not_begun(queues_only):
    """One wave of two CTAs does it all."""
    q, k, v = (torch.randn(2, 300, heads, 64, dtype=torch.float16) for heads in (4, 2, 2))
    with cute_flash.emulated("sm100", **RESIDENT) as emulation:
        cute_flash.flash_attn_func(q, k, v, causal=True)
    assert [report.waves for report in emulation.reports] == [1]
